"""Tables across runs: loss at every budget, losses at equal tokens, the paper's results beside ours."""

from __future__ import annotations

from pretrain.comparison import numbers
from pretrain.comparison.report.paper import PaperRow, paper_loss, paper_row
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.report.tables import Column, Table, arm_table, best_rows, task_name
from pretrain.comparison.run_records import RunRecord

_PAPER_TASKS = ("lambada", "hellaswag", "piqa", "winogrande")


def budgets_table(results: Results) -> Table | None:
    """Causal validation loss of every arm at every budget, the paper's beside it where it has one; None where
    `Results.common_budgets` are none.
    """
    if not results.common_budgets:
        return None
    names = list(results.experiment.arms)
    columns, cells = [Column("Arm", text=True)], [[results.label(name) for name in names]]
    best: set[tuple[int, int]] = set()
    with_paper = False
    for budget in results.common_budgets:
        arms = [results.arm(name, budget) for name in names]
        losses = [arm.validation_loss("causal") for arm in arms]
        best |= {(row, len(columns)) for row in best_rows(arms, [loss for loss, _ in losses])}
        columns.append(Column(numbers.power_of_ten(budget), "measured"))
        cells.append([numbers.plus_minus(*loss, 4) for loss in losses])
        configs = [arm.first.config if arm.runs else None for arm in arms]
        paper = [None if config is None else paper_loss(config, budget) for config in configs]
        if any(paper):
            with_paper = True
            columns.append(Column("", "paper"))
            cells.append([numbers.fixed(loss, 3) for loss in paper])
    note = "Validation loss with causal routing, in nats per token, at the end of a run with these training FLOPs."
    if with_paper:
        note += (
            " Paper: arXiv 2507.10524, at a third as many forward FLOPs, on FineWeb-Edu; its MoR losses are with "
            "top-k routing, which looks ahead. Compare it with ours only on the same data, tokenizer and routing."
        )
    rows = [list(row) for row in zip(*cells)]
    return Table("Loss at every budget of training FLOPs", columns, rows, note, frozenset(best))


def equal_tokens_table(results: Results) -> Table | None:
    """The runs at the number of tokens that all of them saw; None where they all end there, or were validated on
    different texts.
    """
    if results.different_texts(VALIDATION):
        return None
    arms = [arm for arm in results.main_arms if arm.first.tokens and arm.first.validation.get("causal")]
    ends = [arm.first.tokens or 0.0 for arm in arms]
    if len(arms) < 2 or max(ends) <= 1.01 * min(ends):
        return None
    tokens = min(ends)
    reference = next((arm for arm in arms if arm.name == results.experiment.reference_arm), arms[0])

    def flops(arm: Arm) -> float | None:
        return arm.first.training.flops_at(tokens)

    def loss(arm: Arm, routing: str) -> tuple[float | None, float | None]:
        return arm.mean(lambda run: run.validation_at(routing, tokens))

    def topk(arm: Arm) -> str:
        return numbers.fixed(loss(arm, "topk")[0], 4) if arm.first.routed else "same"

    def relative_flops(arm: Arm) -> str:
        own, other = flops(arm), flops(reference)
        return numbers.fixed(own / other if own and other else None, 3)

    return arm_table(
        f"The same runs after {numbers.si(tokens)} tokens",
        arms,
        {
            Column("Loss", "causal"): lambda arm: numbers.plus_minus(*loss(arm, "causal"), 4),
            Column("Loss", "top-k"): topk,
            Column("Training FLOPs", "spent"): lambda arm: numbers.power_of_ten(flops(arm)),
            Column("Training FLOPs", f"of {reference.label}'s"): relative_flops,
            Column("Time"): lambda arm: arm.first.time_for(tokens),
            Column("Learning rate", text=True): lambda arm: _learning_rate(arm.first, tokens),
        },
        "Validation loss in nats per token, read off each curve where all arms have seen equally many tokens. An arm "
        "whose learning rate is still high there would reach a lower loss if its run ended there, so these losses "
        "favour the arms whose rate has decayed.",
    )


def paper_table(results: Results) -> Table | None:
    """Ours beside the paper's main table; None where no arm is among the paper's 360M networks."""
    rows = []
    for arm in results.main_arms:
        if arm.first.config is not None and (row := paper_row(arm.first.config)) is not None:
            rows += [_ours(arm), _theirs(row)]
    if not rows:
        return None
    return Table(
        "Beside the paper's results",
        [
            Column("Arm", text=True),
            Column("Parameters", "without embedding"),
            Column("Tokens"),
            Column("Loss", "causal"),
            Column("Loss", "top-k"),
            *(Column(task_name(task), "%") for task in _PAPER_TASKS),
        ],
        rows,
        "Rows named paper are arXiv 2507.10524's, at 16.5 × 10¹⁸ forward FLOPs (49.5 × 10¹⁸ training FLOPs) on "
        "FineWeb-Edu, evaluated with top-k routing where there is a router. Accuracy is normalised by length "
        "(acc_norm) for HellaSwag and PIQA in the paper; ours is so where the evaluation gave it. "
        "Losses compare only on the same data and tokenizer.",
    )


def _ours(arm: Arm) -> list[str]:
    run = arm.first
    row = [arm.label, numbers.si(run.parameters["non_embedding_stored"]), numbers.si(run.tokens)]
    row += [numbers.plus_minus(*arm.validation_loss("causal"), 4), numbers.fixed(arm.validation_loss("topk")[0], 4)]
    for task in _PAPER_TASKS:
        metric = "acc_norm" if task in ("hellaswag", "piqa") and run.score(task, "acc_norm") else "acc"
        row.append(numbers.accuracy(*arm.mean_score(task, metric)))
    return row


def _theirs(row: PaperRow) -> list[str]:
    loss = numbers.fixed(row.loss, 4)
    losses = [numbers.MISSING, loss] if row.name.startswith("MoR") else [loss, numbers.MISSING]
    accuracies = [numbers.fixed(row.accuracy[task], 1) for task in _PAPER_TASKS]
    return [f"paper: {row.name}", numbers.si(row.parameters), numbers.si(row.tokens), *losses, *accuracies]


def _learning_rate(run: RunRecord, tokens: float) -> str:
    decay, steps, per_step = run.plan.get("decay_steps"), run.plan.get("steps"), run.plan.get("tokens_per_step")
    if run.tokens is not None and tokens >= run.tokens:
        return "at its end"
    if not decay or not steps or not per_step:
        return "not recorded"
    return "coming down" if tokens > (steps - decay) * per_step else "still at its peak"
