"""The score of a question with options: options that are equally likely share the point.

lm-evaluation-harness takes the first of the likeliest options. A network that finds all options equally likely, or that
gives no numbers, would then get full marks in a task whose right answer always comes first, such as BLiMP.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def likeliest(values: Sequence[float]) -> list[int]:
    """Numbers of the options with the largest value; several if they tie up to the rounding of sums."""
    best = max(values)
    return [number for number, value in enumerate(values) if math.isclose(value, best, rel_tol=1e-12)]


def shared_points(
    judged: dict[str, Any], task: Any, doc: Any, answers: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Metrics that replace those of the harness (`judged`, from `process_results`), with ties.

    Metrics that count predictions, such as F1, become `Tied` if options tie.

    Args:
        answers: log-likelihood (nats) and chance under greedy decoding of every option; for mutual information,
            followed by those without the question.
    """
    choices = task.doc_to_choice(doc)
    nats = [value for value, _ in answers[: len(choices)]]
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    right = list(gold) if isinstance(gold, list) else [gold]
    alone = [value for value, _ in answers[len(choices) :]]
    by_metric = {
        "acc": nats,
        "acc_norm": [value / max(len(choice), 1) for value, choice in zip(nats, choices)],
        "acc_bytes": [value / max(len(choice.encode("utf-8")), 1) for value, choice in zip(nats, choices)],
        "acc_mutual_info": [value - without for value, without in zip(nats, alone)],
    }
    shared: dict[str, Any] = {}
    for name in by_metric.keys() & judged.keys():
        shared[name] = statistics.fmean(number in right for number in likeliest(by_metric[name]))
    if "exact_match" in judged:
        shared["exact_match"] = max((answers[number][1] for number in right if 0 <= number < len(choices)), default=0.0)
    tied = likeliest(nats)
    if len(tied) > 1:
        shared |= {
            name: Tied([(judged[name][0], number) for number in tied]) for name in ("f1", "mcc") if name in judged
        }
    return shared


class Tied(tuple[tuple[int, int], ...]):
    """(right option, predicted option) for each of the options that tie; each counts as one of them."""


def counting_ties(aggregate: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], float]:
    """An aggregation of the harness over items of which some are `Tied`; infinite where the result is too large,
    NaN without any.

    Every item counts as often as the least common multiple of all ties, and each part of a tie as its share of that.
    """

    def apply(items: Sequence[Any]) -> float:
        sizes = [len(item) for item in items if isinstance(item, Tied)]
        if sizes:
            times = math.lcm(*sizes)
            tied = (item if isinstance(item, Tied) else [item] for item in items)
            items = [part for item in tied for part in item for _ in range(times // len(item))]
        try:
            return float(aggregate(items))
        except OverflowError:  # perplexity of a model that is far off
            return math.inf
        except ZeroDivisionError:  # nothing but empty answers
            return math.nan

    return functools.wraps(aggregate)(apply)
