"""Tables that look across runs: loss at every budget, the same runs at equal tokens, and the paper's results beside
ours.
"""

from __future__ import annotations

from pretrain.comparison import numbers
from pretrain.comparison.report.paper import PaperRow, paper_loss, paper_row
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.report.tables import Column, Table, best_rows
from pretrain.comparison.run_records import RunRecord


def validation_loss(arm: Arm) -> float | None:
    """Mean over seeds of the causal validation loss at the end of training."""
    return arm.mean(lambda run: run.final_validation("causal"))[0]


def budgets_table(results: Results) -> Table | None:
    """Causal validation loss of every arm at every budget, the paper's beside it where it has one; None with one
    budget, or where arms were validated on different texts.
    """
    budgets = sorted(budget for budget in results.budgets if budget is not None)
    if len(budgets) < 2 or any(results.different_texts(budget, VALIDATION) for budget in budgets):
        return None
    arms = {name: [results.arm(name, budget) for budget in budgets] for name in results.experiment.arms}
    paper = {
        (name, budget): loss
        for name, cells in arms.items()
        for budget, arm in zip(budgets, cells)
        if arm.runs and arm.first.config is not None and (loss := paper_loss(arm.first.config, budget)) is not None
    }
    with_paper = [budget for budget in budgets if any(key[1] == budget for key in paper)]
    columns = [Column("Arm", text=True)]
    rows = [[results.label(name)] for name in arms]
    best: set[tuple[int, int]] = set()
    for index, budget in enumerate(budgets):
        losses: list[float | None] = []
        at_budget = [cells[index] for cells in arms.values()]
        for row, arm in enumerate(at_budget):
            loss, spread = arm.mean(lambda run: run.final_validation("causal"))
            rows[row].append(numbers.plus_minus(loss, spread, 4))
            losses.append(loss)
        best |= {(row, len(columns)) for row in best_rows(at_budget, losses)}
        columns.append(Column(numbers.power_of_ten(budget), "measured"))
        if budget in with_paper:
            columns.append(Column("", "paper"))
            for row, name in enumerate(arms):
                rows[row].append(numbers.fixed(paper.get((name, budget)), 3))
    note = "Validation loss with causal routing, in nats per token, at the end of a run of so many training FLOPs."
    if paper:
        note += (
            " Paper: arXiv 2507.10524, at a third as many forward FLOPs, on FineWeb-Edu; its MoR losses are with "
            "top-k routing, which looks ahead. Compare it with ours only on the same data, tokenizer and routing."
        )
    return Table("Loss at every budget of training FLOPs", columns, rows, note, frozenset(best))


def equal_tokens_table(results: Results, budget: float | None) -> Table | None:
    """The runs at the number of tokens that all of them saw; None where they all end there, or were validated on
    different texts.
    """
    if results.different_texts(budget, VALIDATION):
        return None
    arms = [arm for arm in results.arms(budget) if arm.first.tokens and arm.first.validation.get("causal")]
    ends = [arm.first.tokens or 0.0 for arm in arms]
    if len(arms) < 2 or max(ends) <= 1.01 * min(ends):
        return None
    tokens = min(ends)
    reference = next((arm for arm in arms if arm.name == results.experiment.reference_arm), arms[0])
    reference_flops = reference.first.training.flops_at(tokens)
    rows = []
    for arm in arms:
        run = arm.first
        flops = run.training.flops_at(tokens)
        loss, spread = arm.mean(lambda run: run.validation_at("causal", tokens))
        topk, _ = arm.mean(lambda run: run.validation_at("topk", tokens))
        rows.append(
            [
                arm.label,
                numbers.plus_minus(loss, spread, 4),
                numbers.fixed(topk, 4) if run.routed else "same",
                numbers.power_of_ten(flops),
                numbers.fixed(flops / reference_flops, 3) if flops and reference_flops else "–",
                numbers.duration(tokens / run.tokens_per_second) if run.tokens_per_second else "–",
                _learning_rate(run, tokens),
            ]
        )
    return Table(
        f"The same runs after {numbers.si(tokens)} tokens",
        [
            Column("Arm", text=True),
            Column("Loss", "causal"),
            Column("Loss", "top-k"),
            Column("Training FLOPs", "spent"),
            Column("Training FLOPs", f"of {reference.label}'s"),
            Column("Time"),
            Column("Learning rate", text=True),
        ],
        rows,
        "Validation loss in nats per token, read off each curve where all arms have seen equally many tokens. An "
        "arm whose learning "
        "rate has not come down by then would stand lower if its run ended there, so these losses favour the arms "
        "whose rate has.",
    )


def paper_table(results: Results, budget: float | None) -> Table | None:
    """Ours beside the paper's main table; None where no arm is among the paper's 360M networks."""
    pairs = [
        (arm, row)
        for arm in results.arms(budget)
        if arm.first.config is not None and (row := paper_row(arm.first.config)) is not None
    ]
    if not pairs:
        return None
    tasks = ("lambada", "hellaswag", "piqa", "winogrande")
    rows = []
    for arm, row in pairs:
        rows.append(_ours(arm, tasks))
        rows.append(_theirs(row, tasks))
    return Table(
        "Beside the paper's results",
        [
            Column("Arm", text=True),
            Column("Parameters", "without embedding"),
            Column("Tokens"),
            Column("Loss", "causal"),
            Column("Loss", "top-k"),
            Column("LAMBADA", "%"),
            Column("HellaSwag", "%"),
            Column("PIQA", "%"),
            Column("WinoGrande", "%"),
        ],
        rows,
        "Rows named paper are arXiv 2507.10524's, at 16.5 × 10¹⁸ forward FLOPs (49.5 × 10¹⁸ training FLOPs) on "
        "FineWeb-Edu, evaluated with "
        "top-k routing where there is a router. Accuracy is normalised by length (acc_norm) for HellaSwag and PIQA "
        "in the paper; ours is "
        "so where the evaluation gave it. Losses compare only on the same data and tokenizer.",
    )


def _ours(arm: Arm, tasks: tuple[str, ...]) -> list[str]:
    run = arm.first
    causal, spread = arm.mean(lambda run: run.final_validation("causal"))
    topk, _ = arm.mean(lambda run: run.final_validation("topk"))
    cells = [arm.label, numbers.si(run.parameters["non_embedding_stored"]), numbers.si(run.tokens)]
    cells += [numbers.plus_minus(causal, spread, 4), numbers.fixed(topk, 4)]
    for task in tasks:
        metric = "acc_norm" if task in ("hellaswag", "piqa") and run.score(task, "acc_norm") else "acc"
        value, error, _ = arm.mean_score(task, metric)
        cells.append(numbers.accuracy(value, error))
    return cells


def _theirs(row: PaperRow, tasks: tuple[str, ...]) -> list[str]:
    routed = row.name.startswith("MoR")
    losses = ["–", numbers.fixed(row.loss, 4)] if routed else [numbers.fixed(row.loss, 4), "–"]
    accuracies = [numbers.fixed(row.accuracy[task], 1) for task in tasks]
    return [f"paper: {row.name}", numbers.si(row.parameters), numbers.si(row.tokens), *losses, *accuracies]


def _learning_rate(run: RunRecord, tokens: float) -> str:
    decay, steps, per_step = run.plan.get("decay_steps"), run.plan.get("steps"), run.plan.get("tokens_per_step")
    if run.tokens is not None and tokens >= run.tokens:
        return "at its end"
    if not decay or not steps or not per_step:
        return "not recorded"
    return "coming down" if tokens > (steps - decay) * per_step else "still at its peak"
