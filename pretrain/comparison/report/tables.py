"""The report's tables as values: page, markdown and terminal print the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.comparison import numbers
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.run_records import RunRecord
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


@dataclass(frozen=True)
class LossMetric:
    """A column of the loss table: heading, unit, name in the evaluation, decimals, whether its spread is shown."""

    head: str
    unit: str
    name: str
    digits: int
    spread: bool = False


HELD_OUT = "perplexity"
_WHOLE_TEXT_SUITES = ("perplexity", "routing", "wikitext")
LOSS_METRICS = (
    LossMetric("Loss", "nats / token", "loss", 4, spread=True),
    LossMetric("Perplexity", "per token", "token_perplexity", 2),
    LossMetric("Perplexity", "per word", "word_perplexity", 1),
    LossMetric("Perplexity", "per byte", "byte_perplexity", 4),
    LossMetric("Bits", "per byte", "bits_per_byte", 4, spread=True),
)


def size_table(results: Results, budget: float | None) -> Table:
    rows = []
    for arm in results.arms(budget):
        parameters = arm.first.parameters
        rows.append(
            [
                arm.label,
                *(
                    numbers.si(parameters[name])
                    for name in ("total_stored", "embedding", "non_embedding_stored", "applied")
                ),
                numbers.si(3 * arm.first.plan["flops_per_token_forward"]),
                numbers.whole(arm.first.kv_bytes),
            ]
        )
    return Table(
        "Parameters, and the cost of one token",
        [
            Column("Arm", text=True),
            Column("Stored", "all"),
            Column("Stored", "embedding"),
            Column("Stored", "the rest"),
            Column("Applied", "the rest"),
            Column("Training FLOPs", "per token"),
            Column("KV cache", "bytes per token"),
        ],
        rows,
        "Applied counts a shared layer once per application, for a token that takes every recursion step. The "
        "key-value cache is that "
        "of two-byte values at the planned capacities.",
    )


def budget_table(results: Results, budget: float | None) -> Table:
    rows = []
    for arm in results.arms(budget):
        run = arm.first
        planned, counted = run.plan.get("training_flops"), run.counted_flops
        rows.append(
            [
                arm.label,
                numbers.si(run.tokens),
                numbers.whole(run.step),
                numbers.power_of_ten(planned, 4),
                numbers.power_of_ten(counted, 4),
                numbers.signed(100 * (counted / planned - 1), 2) + " %" if counted and planned else "–",
            ]
        )
    return Table(
        "What each arm was given",
        [
            Column("Arm", text=True),
            Column("Tokens", "seen"),
            Column("Steps"),
            Column("Training FLOPs", "planned"),
            Column("Training FLOPs", "counted"),
            Column("Counted", "against planned"),
        ],
        rows,
        "FLOPs are three times those of the forward pass: every application of a layer counts, for the tokens "
        "active there; norms, "
        "activations and the embedding look-up do not. Planned is from the configured capacities, counted from the "
        "tokens that were "
        "active, step by step.",
    )


def routing_table(results: Results, budget: float | None) -> Table:
    rows = []
    apart = {task: results.different_texts(budget, task) is not None for task in (VALIDATION, "routing")}
    for arm in results.arms(budget):
        routed = arm.first.routed
        causal, causal_spread = arm.mean(lambda run: run.final_validation("causal"))
        topk, topk_spread = arm.mean(lambda run: run.final_validation("topk"))
        if apart[VALIDATION]:
            causal = topk = None
        gap = causal - topk if causal is not None and topk is not None else None
        test = {
            name: (None, None, 0) if apart["routing"] else arm.mean_score("routing", name)
            for name in ("loss_causal", "loss_topk", "leak")
        }
        row = [arm.label, numbers.plus_minus(causal, causal_spread, 4)]
        row += [numbers.plus_minus(topk, topk_spread, 4), numbers.signed(gap, 4)] if routed else ["same", "–"]
        row.append(numbers.fixed(test["loss_causal"][0], 4))
        leak, leak_error, _ = test["leak"]
        row += (
            [numbers.fixed(test["loss_topk"][0], 4), numbers.signed_plus_minus(leak, leak_error, 4)]
            if routed
            else ["same", "–"]
        )
        rows.append(row)
    return Table(
        "Loss by routing, in nats per token",
        [
            Column("Arm", text=True),
            Column("Causal", "validation"),
            Column("Top-k", "validation"),
            Column("Difference", "validation"),
            Column("Causal", "test, packed"),
            Column("Top-k", "test, packed"),
            Column("Difference", "test, packed"),
        ],
        rows,
        "Causal routing decides from a token's past alone; it is the headline wherever this report names one "
        "number. Top-k routing, "
        "used in training, chooses among all tokens of a sequence and so looks at future ones; its loss is shown to "
        "measure that leak. "
        "Packed: documents joined and cut into full sequences as in training, so these losses differ from the "
        f"document-wise ones above. {_spread_note(results, 'the sequences')}",
    )


def test_table(results: Results, budget: float | None, task: str) -> Table | None:
    """Loss, perplexities and bits per byte of a text; None where the arms read different texts."""
    arms = results.arms(budget)
    if results.different_texts(budget, task):
        return None
    scores = [[run.score(task, "loss") for run in arm.runs] for arm in arms]
    lost = [max((score.lost for score in side if score and score.lost is not None), default=None) for side in scores]
    losing = any(lost)
    rows = []
    for arm, share in zip(arms, lost):
        cells = [arm.label]
        for metric in LOSS_METRICS:
            value, spread, _ = arm.mean_score(task, metric.name)
            cells.append(numbers.plus_minus(value, spread if metric.spread else None, metric.digits))
        cells += [numbers.percent(share, 2)] if losing else []
        cells.append(_routing(arm, task))
        rows.append(cells)
    examples = next((score.n for side in scores for score in side if score and score.n), None)
    note = "Words are separated by white space, as WikiText is measured"
    if losing:
        note += "; where tokens do not hold all bytes of the text, figures per word and per byte say nothing of it"
    elif lost and all(share == 0 for share in lost):
        note += "; bits per byte do not depend on the tokenizer, which loses nothing of the text"
    return Table(
        f"{task_name(task)}{f', {numbers.whole(examples)} documents' if examples else ''}",
        [
            Column("Arm", text=True),
            *(Column(metric.head, metric.unit) for metric in LOSS_METRICS),
            *([Column("Lost", "% of the bytes")] if losing else []),
            Column("Routing", text=True),
        ],
        rows,
        f"{note}. {_spread_note(results, 'the documents')}",
        frozenset(
            (row, column + 1)
            for column, metric in enumerate(LOSS_METRICS)
            for row in best_rows(arms, [arm.mean_score(task, metric.name)[0] for arm in arms])
        ),
    )


def task_name(task: str) -> str:
    return TASK_NAMES.get(task, task)


def loss_tasks(results: Results, budget: float | None) -> list[str]:
    """Texts that are measured as perplexity, the run's own test text first."""
    tasks = {score.task for arm in results.arms(budget) for score in arm.first.scores if score.metric == "loss"}
    return sorted(tasks, key=lambda task: (task != HELD_OUT, task))


def few_shot_scores(results: Results, budget: float | None) -> dict[str, list[Score | None]]:
    """The figure that stands for each task: task to one score per arm (of the first seed), in the order of
    `results.arms`.

    Of the project's own suite every task is shown; of others their headline figure, which for BLiMP or MMLU is the
    mean of many.
    """
    arms = results.arms(budget)
    shown: dict[str, str] = {}
    for arm in arms:
        for score in arm.first.scores:
            of_own_suite = score.suite == "own" and score.task != "own" and score.metric == "acc"
            if of_own_suite or (score.headline and score.suite not in (*_WHOLE_TEXT_SUITES, "own")):
                shown.setdefault(score.task, score.metric)
    return {task: [arm.first.score(task, metric) for arm in arms] for task, metric in shown.items()}


def few_shot_table(results: Results, budget: float | None) -> Table:
    arms = results.arms(budget)
    rows = []
    shown = few_shot_scores(results, budget)
    cut = any(score.prompts_cut for scores in shown.values() for score in scores if score is not None)
    for task, scores in shown.items():
        known = [score for score in scores if score is not None]
        if results.different_texts(budget, task):
            continue  # said by `refusals`
        chance = known[0].chance
        cells = [TASK_NAMES.get(task, task), known[0].metric, numbers.whole(known[0].n)]
        cells.append("–" if chance is None else numbers.fixed(100 * chance, 1))
        for arm in arms:
            value, spread, _ = arm.mean_score(task, known[0].metric)
            cells.append(numbers.accuracy(value, spread))
        cells += [_range([score.prompts_cut for score in known])] if cut else []
        cells.append(", ".join(sorted({score.routing for score in known})))
        rows.append(cells)
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
        f"{_spread_note(results, 'the examples')} A score within twice its ± of chance says nothing about the model, "
        "and of few examples little."
        + (" A prompt that is cut lost its beginning, examples included: it did not fit." if cut else ""),
    )


def refusals(results: Results, budget: float | None) -> list[str]:
    """A sentence for each text whose figures are not compared, because the arms read different ones."""
    found = {
        score.task
        for arm in results.arms(budget)
        for score in arm.first.scores
        if score.headline or score.suite == "own"
    }
    evaluate = "Start mor compare run again without --arm: it evaluates the others anew."
    train = "Remove the run folders of one side and start mor compare run again: this loss is measured in training."
    # Validation losses are compared at every budget, the others at this one.
    places = [(VALIDATION, other, train) for other in results.budgets]
    places += [(task, budget, evaluate) for task in sorted(found)]
    return list(
        dict.fromkeys(
            f"{task_name(task)}: not compared, because the arms read different text ({different}). {remedy}"
            for task, place, remedy in places
            if (different := results.different_texts(place, task))
        )
    )


def speed_table(results: Results, budget: float | None) -> Table:
    rows = []
    for arm in results.arms(budget):
        run = arm.first
        seconds = run.tokens / run.tokens_per_second if run.tokens and run.tokens_per_second else None
        rows.append(
            [
                arm.label,
                numbers.whole(run.tokens_per_second),
                numbers.fixed(run.step_seconds, 3),
                numbers.si(_per_second(run), "FLOP/s"),
                numbers.duration(seconds),
                numbers.gibibytes(run.memory_peak_bytes),
            ]
        )
    return Table(
        "Training on the machine named below",
        [
            Column("Arm", text=True),
            Column("Tokens / s", "median, all ranks"),
            Column("Step", "seconds, median"),
            Column("Model FLOPs", "per second"),
            Column("Training", "at that speed"),
            Column("Peak memory", "of one rank"),
        ],
        rows,
        "Medians leave out the first tenth of the run. Speed depends on the machine and on what else it was doing; "
        "parameters, tokens and losses do not.",
    )


def skipped_table(results: Results) -> Table | None:
    """What evaluation left out, each thing once, parts of one benchmark in one row; None when nothing was."""
    parts: dict[tuple[str, str, str], set[str]] = {}
    for record in results.records:
        for entry in record.skipped:
            task = entry["task"] or entry["suite"]
            benchmark = next((name for name in TASK_NAMES if task.startswith(f"{name}_")), task)
            parts.setdefault((benchmark, entry["why"], entry["how"]), set()).add(task)
    if not parts:
        return None
    rows = []
    for (benchmark, why, how), tasks in parts.items():
        name = TASK_NAMES.get(benchmark, benchmark)
        rows.append([f"{name} ({len(tasks)} parts)" if len(tasks) > 1 else name, why, how])
    columns = [Column("Skipped", text=True), Column("Why", text=True), Column("How to get it", text=True)]
    return Table("What was not measured", columns, rows)


TASK_NAMES = {
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


def _per_second(run: RunRecord) -> float | None:
    return 3 * run.plan["flops_per_token_forward"] * run.tokens_per_second if run.tokens_per_second else None


def _routing(arm: Arm, task: str) -> str:
    if not arm.first.routed:
        return "no router"
    return ", ".join(sorted({score.routing for run in arm.runs for score in run.scores if score.task == task})) or "–"


def _spread_note(results: Results, over: str) -> str:
    if len(results.seeds) > 1:
        return f"± is the standard deviation over seeds, for an arm of one seed the standard error over {over}."
    return f"± is the standard error over {over}."


def best_rows(arms: Sequence[Arm], values: Sequence[float | None]) -> list[int]:
    """Where the lowest of the arms' values stands: at several places when it is a tie, nowhere with fewer than two to
    compare, or where the arms did not finish with the same seeds. What is not finite is never the best.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    seeds = {tuple(run.trial.seed for run in arm.runs) for arm in arms if arm.runs}
    if len(finite) < 2 or len(seeds) > 1:
        return []
    lowest = min(finite)
    return [row for row, value in enumerate(values) if value == lowest]


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return numbers.whole(high) if low == high else f"{numbers.whole(low)} to {numbers.whole(high)}"
