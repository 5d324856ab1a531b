"""What was measured, in sentences: differences with their uncertainty, and no claim beyond the measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.comparison import numbers
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.report.statistics import Difference, difference_of_seeds, wilson_interval
from pretrain.comparison.report.tables import HELD_OUT, few_shot_scores, refusals, task_name


def findings(results: Results) -> list[str]:
    """The summary of a report, most important first; also says what is missing."""
    arms = results.main_arms
    if not arms:
        return ["No arm has finished training yet, so there is nothing to compare."]
    sentences = []
    reference = results.reference(results.main_budget)
    if reference is None:
        missing = results.label(results.experiment.reference_arm)
        sentences.append(f"{missing}, the arm to compare with, has not finished.")
    else:
        others = [arm for arm in arms if arm.name != reference.name]
        sentences += [_against(results, arm, reference) for arm in others]
        sentences += [_smaller_budgets(results, arm.name) for arm in others]
    sentences += refusals(results)
    sentences += [_not_finite(arm) for arm in arms]
    sentences += [_few_shot(results)] if few_shot_scores(results) else []
    sentences += [_cut(arm) for arm in arms] + [_lost(arm) for arm in arms]
    sentences += [_depth(arm) for arm in arms]
    sentences += [_agreement(arms), _seeds(arms)]
    return [sentence for sentence in sentences if sentence]


def test_difference(results: Results, arm: Arm, reference: Arm) -> tuple[Difference, str] | None:
    """Difference of the causal loss, and the text it is on: the held-out test text, or the validation split where
    that is missing. None where neither compares, or a loss on them is not finite.
    """
    tested = results.difference(arm, reference, HELD_OUT, "loss")
    if tested is not None:
        return tested, "the held-out test text"
    if any(where for side in (arm, reference) for where in _losses_not_finite(side)):
        return None
    validated = _validation_difference(arm, reference)
    return None if validated is None else (validated, "the validation text")


def _validation_difference(arm: Arm, reference: Arm) -> Difference | None:
    """Of the causal loss at the end of training, over the seeds that both have; None where there is none, or where the
    text is not the same.
    """
    if len(arm.texts(VALIDATION) | reference.texts(VALIDATION)) > 1:
        return None
    values, references = (
        {run.trial.seed: loss for run in side.runs if (loss := run.final_validation("causal")) is not None}
        for side in (arm, reference)
    )
    common = [seed for seed in values if seed in references]
    if len(common) == 1:
        return Difference(values[common[0]] - references[common[0]], None, "examples")
    return difference_of_seeds(values, references)


def equal_cost(arms: list[Arm]) -> str:
    """`equal training FLOPs`, `equal tokens` or, where neither holds within 1 %, neither."""
    flops, tokens = [arm.first.counted_flops for arm in arms], [arm.first.tokens for arm in arms]
    if _alike(flops):
        return "at equal training FLOPs"
    if _alike(tokens):
        return "at equal tokens"
    return "at the unequal budgets of this experiment" if all(flops) else "at a cost that was not recorded"


def _alike(amounts: list[float | None]) -> bool:
    known = [amount for amount in amounts if amount]
    return len(known) == len(amounts) and max(known) <= 1.01 * min(known)


def _against(results: Results, arm: Arm, reference: Arm) -> str:
    found = test_difference(results, arm, reference)
    both = f"{arm.label} and {reference.label}"
    if found is None:
        broken = [side.label for side in (arm, reference) if any(_losses_not_finite(side))]
        if broken:
            return f"{both} are not compared: a loss of {_list(broken)} is not finite. {_terms(arm, reference)}"
        return f"{both} have no loss in common to compare."
    difference, text = found
    where = f"on {text} {equal_cost([arm, reference])}"
    if difference.value == 0.0:
        sentence = f"{both} have exactly the same loss {where}: neither is better"
    elif difference.half_width is None or difference.clear:
        digits = 3 if abs(difference.value) >= 0.0005 else 6  # not "0.000 worse"
        size = f"{numbers.fixed(abs(difference.value), digits)} nats per token"
        sentence = (
            f"{arm.label} is {size} {'worse' if difference.value > 0 else 'better'} than {reference.label} {where}"
        )
        if difference.half_width is None:
            sentence += "; no uncertainty of this difference was measured"
        else:
            sentence += f" ({_interval(difference, digits)})"
    else:
        size = f"{numbers.signed(difference.value)} nats per token"
        sentence = f"{both} cannot be told apart {where}: {size} ({_interval(difference)})"
    return f"{sentence}. {_terms(arm, reference)}"


def _losses_not_finite(arm: Arm) -> Iterator[str]:
    """Where a loss of the arm is not finite: in training, in validation, on a text."""
    for run in arm.runs:
        name = run.trial.name
        if run.training and not math.isfinite(run.training.values[-1]):
            yield f"at the end of training ({name})"
        for routing in run.validation:
            if not math.isfinite(run.final_validation(routing) or 0.0):
                yield f"on the validation text with {routing.replace('topk', 'top-k')} routing ({name})"
        score = run.score(HELD_OUT, "loss")
        if score is not None and not math.isfinite(score.value):
            yield f"on the held-out test text ({name})"


def _not_finite(arm: Arm) -> str:
    """Which figures are not finite, and because of how many examples."""
    losses = list(dict.fromkeys(_losses_not_finite(arm)))
    tasks = {
        score.task: score.not_finite
        for run in arm.runs
        for score in run.scores
        if score.not_finite or (not math.isfinite(score.value) and score.task != HELD_OUT)
    }
    parts = [f"its loss {_list(losses)}"] if losses else []
    if tasks:
        counted = [task_name(task) + (f" ({n} of its examples)" if n else "") for task, n in tasks.items()]
        parts.append(f"figures of {_list(counted)}")
    if not parts:
        return ""
    return f"{arm.label} is not finite: {'; '.join(parts)}. Such figures are not ranked."


def _cut(arm: Arm) -> str:
    cut = dict.fromkeys(f"{task_name(s.task)} ({s.prompts_cut} of {s.n})" for s in arm.first.scores if s.prompts_cut)
    return f"Prompts longer than the context of {arm.label} lost their beginning: {_list([*cut])}." if cut else ""


def _lost(arm: Arm) -> str:
    lost = dict.fromkeys(f"{numbers.percent(s.lost, 2)} of {task_name(s.task)}" for s in arm.first.scores if s.lost)
    if not lost:
        return ""
    return f"The tokens of {arm.label} do not hold all bytes ({_list([*lost])}), so its bits per byte are not given."


def _interval(difference: Difference, digits: int = 3) -> str:
    over = "over seeds" if difference.over == "seeds" else "over the test documents alone"
    low, high = (numbers.signed(end, digits) for end in (difference.low, difference.high))
    return f"95 % interval {low} to {high}, {over}"


def _terms(arm: Arm, reference: Arm) -> str:
    stored = arm.first.parameters["non_embedding_stored"] / reference.first.parameters["non_embedding_stored"]
    terms = f"{arm.label} stores {_ratio(stored)} parameters outside the embedding"
    if arm.first.tokens and reference.first.tokens:
        terms += f" and saw {_ratio(arm.first.tokens / reference.first.tokens)} tokens"
    return f"{terms}."


def _ratio(value: float) -> str:
    return "as many" if abs(value - 1) < 0.005 else f"{value:.2f} times as many"


def _smaller_budgets(results: Results, name: str) -> str:
    """Differences of the causal validation loss at the other budgets than the main one."""
    parts = []
    for budget in sorted(budget for budget in results.budgets if budget is not None and budget != results.main_budget):
        arm, reference = results.arm(name, budget), results.reference(budget)
        found = _validation_difference(arm, reference) if reference is not None else None
        if found is not None:
            interval = f" ({_interval(found)})" if found.half_width is not None else ""
            parts.append(f"{numbers.signed(found.value)}{interval} at {numbers.power_of_ten(budget)} training FLOPs")
    if not parts:
        return ""
    names = (results.label(name), results.label(results.experiment.reference_arm))
    return f"Validation loss of {names[0]} against {names[1]}, in nats per token: {_list(parts)}."


def _depth(arm: Arm) -> str:
    """Whether causal routing computes much more or less than the top-k routing whose FLOPs were counted."""
    causal, topk = arm.first.mean_depth("causal"), arm.first.mean_depth("topk")
    if not arm.first.routed or not causal or not topk or abs(causal / topk - 1) < 0.05:
        return ""
    more = "more" if causal > topk else "less"
    return (
        f"With causal routing a token of {arm.label} takes {causal:.2f} recursion steps on average, with the top-k "
        f"routing of training {topk:.2f}: it computes {more} when it is used than the budget of training counts."
    )


def _few_shot(results: Results) -> str:
    above: list[str] = []
    at_chance: list[str] = []
    for task, scores in few_shot_scores(results).items():
        finite = [score for score in scores if score is not None and math.isfinite(score.value)]
        known = [wilson_interval(s.value, s.n or 0)[0] - s.chance for s in finite if s.chance is not None]
        if known:
            (above if max(known) > 0 else at_chance).append(task_name(task))
    parts = []
    if above:
        parts.append(f"At least one arm is above chance on {_list(above)} (its 95 % interval excludes chance).")
    if at_chance:
        parts.append(f"On {_list(at_chance)} no arm can be told from chance, so these scores do not rank the arms.")
    return " ".join(parts)


def _agreement(arms: list[Arm]) -> str:
    flops = [run.counted_flops or 0.0 for arm in arms for run in arm.runs]
    if len(arms) < 2 or not all(flops):
        return ""
    spread = 100 * (max(flops) / min(flops) - 1)
    words = f"agree within {max(spread, 0.01):.2f} %" if spread <= 1 else f"differ by {spread:.1f} %"
    verdict = "" if spread <= 1 else ", so their losses are not at equal cost"
    return f"The arms' counted training FLOPs {words} (mean {numbers.power_of_ten(sum(flops) / len(flops))}){verdict}."


def _seeds(arms: list[Arm]) -> str:
    seeds = [[run.trial.seed for run in arm.runs] for arm in arms]
    first = seeds[0]
    if any(others != first for others in seeds):
        listed = "; ".join(f"{arm.label}: {', '.join(map(str, own))}" for arm, own in zip(arms, seeds))
        return (
            f"The arms did not finish with the same seeds ({listed}), so their means do not rank them. Each difference "
            "above is of the seeds that both arms have; that of a single seed says nothing of another one."
        )
    if len(first) == 1:
        return (
            "This is one seed per arm: how much a difference would change with another initialisation and order of "
            "data was not measured, and no interval here covers it."
        )
    return (
        f"Each arm was trained with {len(first)} seeds; an interval over seeds is Student's t of the differences seed "
        "by seed, which is wide for so few."
    )


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
