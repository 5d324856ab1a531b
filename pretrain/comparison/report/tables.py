"""The report's tables as values, from which page and markdown are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.comparison import numbers
from pretrain.comparison.experiment import WHOLE_TEXTS
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.scores import Score


@dataclass(frozen=True)
class Column:
    """A heading, what it is measured in, and whether the column holds text (left-aligned) or numbers."""

    head: str
    unit: str = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """`title` says what the table shows, `note` how to read it; `best` marks (row, column) cells to set in bold."""

    title: str
    columns: list[Column]
    rows: list[list[str]]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()


HELD_OUT = "perplexity"
# Columns of a loss table: heading, name in the evaluation, decimals, whether the spread is shown.
_LOSS_METRICS = (
    (Column("Loss", "nats / token"), "loss", 4, True),
    (Column("Perplexity", "per token"), "token_perplexity", 2, False),
    (Column("Perplexity", "per word"), "word_perplexity", 1, False),
    (Column("Perplexity", "per byte"), "byte_perplexity", 4, False),
    (Column("Bits", "per byte"), "bits_per_byte", 4, True),
)


_TASK_NAMES = {
    HELD_OUT: "Held-out test text",
    VALIDATION: "Validation text",
    "routing": "Loss by routing",
    "own_last_word": "Last word (own)",
    "own_continuation": "Continuation (own)",
    "own_word_order": "Word order (own)",
    "wikitext": "WikiText-2 test",
    "lambada": "LAMBADA",
    "blimp": "BLiMP",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "sciq": "SciQ",
    "boolq": "BoolQ",
    "openbookqa": "OpenBookQA",
    "mmlu": "MMLU",
    "copa": "COPA",
}


def arm_table(title: str, arms: Sequence[Arm], columns: dict[Column, Callable[[Arm], str]], note: str) -> Table:
    """A row per arm: its label, then what each column writes of it."""
    rows = [[arm.label, *(write(arm) for write in columns.values())] for arm in arms]
    return Table(title, [Column("Arm", text=True), *columns], rows, note)


def size_table(results: Results) -> Table:
    def parameters(name: str) -> Callable[[Arm], str]:
        return lambda arm: numbers.si(arm.first.parameters[name])

    return arm_table(
        "Parameters, and the cost of one token",
        results.main_arms,
        {
            Column("Stored", "all"): parameters("total_stored"),
            Column("Stored", "embedding"): parameters("embedding"),
            Column("Stored", "the rest"): parameters("non_embedding_stored"),
            Column("Applied", "the rest"): parameters("applied"),
            Column("Training FLOPs", "per token"): lambda arm: numbers.si(arm.first.training_flops_per_token),
            Column("KV cache", "bytes per token"): lambda arm: numbers.whole(arm.first.kv_bytes),
        },
        "Applied counts a shared layer once per application, for a token that takes every recursion step. The "
        "key-value cache is that of two-byte values at the planned capacities.",
    )


def budget_table(results: Results) -> Table:
    def planned(arm: Arm) -> float | None:
        return arm.first.plan.get("training_flops")

    def against_plan(arm: Arm) -> str:
        plan, counted = planned(arm), arm.first.counted_flops
        return f"{numbers.signed(100 * (counted / plan - 1), 2)} %" if counted and plan else numbers.MISSING

    return arm_table(
        "What each arm was given",
        results.main_arms,
        {
            Column("Tokens", "seen"): lambda arm: numbers.si(arm.first.tokens),
            Column("Steps"): lambda arm: numbers.whole(arm.first.step),
            Column("Training FLOPs", "planned"): lambda arm: numbers.power_of_ten(planned(arm), 4),
            Column("Training FLOPs", "counted"): lambda arm: numbers.power_of_ten(arm.first.counted_flops, 4),
            Column("Counted", "against planned"): against_plan,
        },
        "FLOPs are three times those of the forward pass: every application of a layer counts, for the tokens active "
        "there; norms, activations and the embedding look-up do not. Planned is from the configured capacities, "
        "counted from the tokens that were active, step by step.",
    )


def routing_table(results: Results) -> Table:
    validated, tested = (results.different_texts(task) is None for task in (VALIDATION, "routing"))
    rows = []
    for arm in results.main_arms:
        causal, topk = (arm.validation_loss(name) if validated else (None, None) for name in ("causal", "topk"))
        test_causal, test_topk, leak = (
            arm.mean_score("routing", name) if tested else (None, None) for name in ("loss_causal", "loss_topk", "leak")
        )
        gap = causal[0] - topk[0] if causal[0] is not None and topk[0] is not None else None
        validation = [numbers.plus_minus(*topk, 4), numbers.signed(gap, 4)]
        test = [numbers.fixed(test_topk[0], 4), numbers.signed_plus_minus(*leak, 4)]
        if not arm.first.routed:
            validation = test = ["same", numbers.MISSING]
        rows.append([arm.label, numbers.plus_minus(*causal, 4), *validation, numbers.fixed(test_causal[0], 4), *test])
    return Table(
        "Loss by routing, in nats per token",
        [
            Column("Arm", text=True),
            *(Column(head, "validation") for head in ("Causal", "Top-k", "Difference")),
            *(Column(head, "test, packed") for head in ("Causal", "Top-k", "Difference")),
        ],
        rows,
        "Causal routing decides from a token's past alone; where this report names one number, it is causal. Top-k "
        "routing, used in training, chooses among all tokens of a sequence and so looks at future ones; its loss is "
        "shown to measure that leak. Packed: documents joined and cut into full sequences as in training, so these "
        f"losses differ from the document-wise ones above. {_spread_note(results, 'the sequences')}",
    )


def test_table(results: Results, task: str) -> Table | None:
    """Loss, perplexities and bits per byte of a text; None where the arms read different texts."""
    arms = results.main_arms
    if results.different_texts(task):
        return None
    scores = [[score for run in arm.runs if (score := run.score(task, "loss")) is not None] for arm in arms]
    lost = [max((score.lost for score in side if score.lost is not None), default=None) for side in scores]
    rows = [[arm.label] for arm in arms]
    best: set[tuple[int, int]] = set()
    for number, (_, name, digits, with_spread) in enumerate(_LOSS_METRICS, 1):
        found = [arm.mean_score(task, name) for arm in arms]
        for row, (value, spread) in zip(rows, found):
            row.append(numbers.plus_minus(value, spread if with_spread else None, digits))
        best |= {(row, number) for row in best_rows(arms, [value for value, _ in found])}
    columns = [Column("Arm", text=True), *(column for column, *_ in _LOSS_METRICS)]
    note = "Words are separated by white space, as WikiText is measured"
    if any(lost):
        columns.append(Column("Lost", "% of the bytes"))
        for row, share in zip(rows, lost):
            row.append(numbers.percent(share, 2))
        note += "; where tokens do not hold all bytes of the text, figures per word and per byte say nothing of it"
    elif lost and all(share == 0 for share in lost):
        note += "; bits per byte do not depend on the tokenizer, which loses nothing of the text"
    columns.append(Column("Routing", text=True))
    for row, arm in zip(rows, arms):
        row.append(_routing(arm, task))
    examples = next((score.n for side in scores for score in side if score.n), None)
    return Table(
        f"{task_name(task)}{f', {numbers.whole(examples)} documents' if examples else ''}",
        columns,
        rows,
        f"{note}. {_spread_note(results, 'the documents')}",
        frozenset(best),
    )


def task_name(task: str) -> str:
    return _TASK_NAMES.get(task, task)


def loss_tasks(results: Results) -> list[str]:
    """Texts that are measured as perplexity, the run's own test text first."""
    tasks = {score.task for arm in results.main_arms for score in arm.first.scores if score.metric == "loss"}
    return sorted(tasks, key=lambda task: (task != HELD_OUT, task))


def few_shot_scores(results: Results) -> dict[str, list[Score | None]]:
    """Task to one score per arm (of its first seed): every task of the project's own suite, and of other suites the
    headline figure.
    """
    arms = results.main_arms
    shown: dict[str, str] = {}
    for arm in arms:
        for score in arm.first.scores:
            of_own_suite = score.suite == "own" and score.task != "own" and score.metric == "acc"
            if of_own_suite or (score.headline and score.suite not in (*WHOLE_TEXTS, "own")):
                shown.setdefault(score.task, score.metric)
    return {task: [arm.first.score(task, metric) for arm in arms] for task, metric in shown.items()}


def few_shot_table(results: Results) -> Table:
    arms = results.main_arms
    shown = {
        task: [score for score in scores if score is not None]
        for task, scores in few_shot_scores(results).items()
        if not results.different_texts(task)  # said by `refusals`
    }
    cut = any(score.prompts_cut for scores in shown.values() for score in scores)
    rows = []
    for task, scores in shown.items():
        first = scores[0]
        row = [task_name(task), first.metric, numbers.whole(first.n)]
        row.append(numbers.MISSING if first.chance is None else numbers.fixed(100 * first.chance, 1))
        row += [numbers.accuracy(*arm.mean_score(task, first.metric)) for arm in arms]
        if cut:
            counts = sorted({score.prompts_cut for score in scores})
            row.append(" to ".join(map(numbers.whole, dict.fromkeys((counts[0], counts[-1])))))
        row.append(", ".join(sorted({score.routing for score in scores})))
        rows.append(row)
    note = f"{_spread_note(results, 'the examples')} A score within twice its ± of chance says nothing about the model."
    return Table(
        "Accuracy in per cent",
        [
            Column("Task", text=True),
            Column("Metric", text=True),
            Column("Examples"),
            Column("Chance", "%"),
            *(Column(arm.label) for arm in arms),
            *([Column("Cut", "of the prompts")] if cut else []),
            Column("Routing", text=True),
        ],
        rows,
        f"{note} A prompt that is cut lost its beginning, examples included: it did not fit." if cut else note,
    )


def refusals(results: Results) -> list[str]:
    """A sentence for each text whose figures are not compared, because the arms read different ones."""
    found = {
        score.task for arm in results.main_arms for score in arm.first.scores if score.headline or score.suite == "own"
    }
    evaluate = "Start mor compare run again without --arm: it evaluates the others again."
    train = "Remove the run folders of one side and start mor compare run again: this loss is measured in training."
    # Validation losses are compared at every budget, the others at the main one.
    places = [(VALIDATION, results.arms(budget), train) for budget in results.budgets]
    places += [(task, results.main_arms, evaluate) for task in sorted(found)]
    return list(
        dict.fromkeys(
            f"{task_name(task)}: not compared, because the arms read different text ({different}). {remedy}"
            for task, arms, remedy in places
            if (different := results.different_texts(task, arms))
        )
    )


def speed_table(results: Results) -> Table:
    def flops_per_second(arm: Arm) -> str:
        speed, cost = arm.first.tokens_per_second, arm.first.training_flops_per_token
        return numbers.si(speed * cost if speed and cost else None, "FLOP/s")

    return arm_table(
        "Training on the machine named below",
        results.main_arms,
        {
            Column("Tokens / s", "median, all ranks"): lambda arm: numbers.whole(arm.first.tokens_per_second),
            Column("Step", "seconds, median"): lambda arm: numbers.fixed(arm.first.step_seconds, 3),
            Column("Model FLOPs", "per second"): flops_per_second,
            Column("Training", "at that speed"): lambda arm: arm.first.time_for(arm.first.tokens),
            Column("Peak memory", "of one rank"): lambda arm: numbers.gibibytes(arm.first.memory_peak_bytes),
        },
        "Medians leave out the first tenth of the run. Speed depends on the machine and on what else it was doing; "
        "parameters, tokens and losses do not.",
    )


def skipped_table(results: Results) -> Table | None:
    """What evaluation left out, each thing once, parts of one benchmark in one row; None when nothing was."""
    parts: dict[tuple[str, str, str], set[str]] = {}
    for record in results.records:
        for entry in record.skipped:
            task = entry["task"] or entry["suite"]
            benchmark = next((name for name in _TASK_NAMES if task.startswith(f"{name}_")), task)
            parts.setdefault((benchmark, entry["why"], entry["how"]), set()).add(task)
    if not parts:
        return None
    rows = [
        [task_name(benchmark) + (f" ({len(tasks)} parts)" if len(tasks) > 1 else ""), why, how]
        for (benchmark, why, how), tasks in parts.items()
    ]
    columns = [Column("Skipped", text=True), Column("Why", text=True), Column("How to get it", text=True)]
    return Table("What was not measured", columns, rows)


def _routing(arm: Arm, task: str) -> str:
    if not arm.first.routed:
        return "no router"
    return ", ".join(sorted({score.routing for run in arm.runs for score in run.scores if score.task == task})) or "–"


def _spread_note(results: Results, over: str) -> str:
    seeds = "deviation over seeds, for an arm of one seed the standard " if len(results.seeds) > 1 else ""
    return f"± is the standard {seeds}error over {over}."


def best_rows(arms: Sequence[Arm], values: Sequence[float | None]) -> list[int]:
    """Rows of the lowest value: several when it is a tie; none with fewer than two finite values, or where the arms did
    not finish with the same seeds.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    seeds = {tuple(run.trial.seed for run in arm.runs) for arm in arms if arm.runs}
    if len(finite) < 2 or len(seeds) > 1:
        return []
    lowest = min(finite)
    return [row for row, value in enumerate(values) if value == lowest]
