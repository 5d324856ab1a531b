"""Figures of one task out of a result of `mor eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from data_prep.plain_text import plain
from pretrain.records.fields import Fields

# Figures that are divided by a size of the text; null in the evaluation if the tokens do not hold all of the text.
_NEED_WHOLE_TEXT = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
        value: the number, nan when it is not finite; stderr: its standard error over the examples, if known.
        n: examples; routing: `causal` or `topk`; chance: the score of guessing, None where guessing has no score.
        headline: whether this is the one figure that stands for its suite.
        text: what was read; scores of one task are compared only where it is the same. Empty where it was not recorded.
        not_finite: examples without a finite likelihood.
        lost: share of the text's bytes that its tokens do not hold, None where it was not recorded.
        prompts_cut: examples whose prompt did not fit into the context.
        sums, weights: where the evaluation kept them, what each example adds to the numerator and the denominator of
            `value`, so that two arms can be compared example by example.
    """

    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    routing: str
    chance: float | None = None
    headline: bool = False
    text: str = ""
    not_finite: int = 0
    lost: float | None = None
    prompts_cut: int = 0
    sums: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


def read_task(suite: str, task: str, result: Fields, headline: dict[str, Any]) -> list[Score]:
    """The scores of one task.

    Args:
        result: the task's record; headline: task and metric that stand for the suite.

    Raises:
        RunError: a value is not what `mor eval` writes.
    """
    metrics = Fields(result.object("metrics"), f"{result.where}: metrics")
    errors = Fields(result.object("stderr"), f"{result.where}: stderr")
    documents = Fields(result.object("documents"), f"{result.where}: documents")
    lost = result.amount("lost_bytes", None)
    read = result.amount("scored_bytes", None) or result.amount("text_bytes", None)
    refused = _NEED_WHOLE_TEXT if lost else ()
    values = {name: metrics.number(name) for name in metrics.values if name not in refused}
    stderr = {name: _known(errors.number(name)) for name in errors.values}
    if (perplexity := values.get("token_perplexity")) is not None:
        # The loss is its logarithm, and its standard error that of the logarithm to first order.
        values = {"loss": math.log(perplexity) if perplexity > 0 else math.nan, **values}
        error = stderr.get("token_perplexity")
        stderr = {"loss": None if error is None or not perplexity > 0 else error / perplexity, **stderr}
    sums, weights = documents.numbers("nats"), documents.numbers("tokens")
    paired = len(sums) == len(weights) and all(map(math.isfinite, sums)) and all(weight > 0 for weight in weights)
    n = result.amount("n", None)
    return [
        Score(
            suite=suite,
            task=plain(task),
            metric=plain(metric),
            value=value,
            stderr=stderr.get(metric),
            n=None if n is None else int(n),
            routing=plain(result.text("routing")),
            chance=_known(result.number("chance", None)) if metric.startswith("acc") else None,
            headline=(task, metric) == (headline.get("task"), headline.get("metric")),
            text=_text(result, n),
            not_finite=int(result.amount("not_finite", None) or 0),
            lost=lost / read if lost is not None and read else None,
            prompts_cut=int(result.amount("prompts_cut", None) or 0),
            sums=tuple(sums) if metric == "loss" and paired else (),
            weights=tuple(weights) if metric == "loss" and paired else (),
        )
        for metric, value in values.items()
    ]


def _text(result: Fields, n: float | None) -> str:
    read = result.amount("text_bytes", None)
    digest = result.text("text_sha256", None)
    if digest is not None:
        size = f"{read:,.0f} bytes " if read is not None else ""
        return f"{size}(SHA-256 {plain(digest)[:12]})"
    # Results without a record of the text were of different texts at least where they are of different numbers.
    return f"{read:,.0f} bytes" if read is not None else f"{n:,.0f} examples" if n is not None else ""


def _known(value: float | None) -> float | None:
    """None for a value that is not finite: such a standard error says nothing."""
    return value if value is not None and math.isfinite(value) else None
