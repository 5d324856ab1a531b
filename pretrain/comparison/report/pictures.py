"""The report's pictures: curves, bars of depth, intervals of scores."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.comparison import numbers
from pretrain.comparison.report.drawing import FAINT, INK, PAPER, Picture, arm_colour, marker, name_legend, new_figure
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.report.statistics import wilson_interval
from pretrain.comparison.report.tables import few_shot_scores, task_name
from pretrain.comparison.run_records import Curve, RunRecord
from pretrain.comparison.scores import Score

# One hue, light to dark with depth, and the text that can be read on it; the same by day and by night.
_DEPTH_COLOURS = ("#d9dde2", "#c6dcf0", "#74aed6", "#2b6ca8", "#0d3c6e", "#08264a", "#051a33")
_DEPTH_KINDS = {"causal": "causal", "topk": "top-k", "training": "in training"}

Axis = Callable[[Curve], list[float]]


def loss_picture(results: Results) -> Picture | None:
    """Loss against counted training FLOPs: the whole run, and its end magnified."""
    return _curves_picture(
        results,
        "Loss against training FLOPs",
        "Validation loss with causal routing (marks) and training loss, smoothed (thin lines), in nats per token, "
        "against training FLOPs as counted. The second panel is the end of the first, magnified.",
        lambda curve: curve.flops,
        "training FLOPs",
    )


def tokens_picture(results: Results) -> Picture | None:
    """The same losses against tokens seen."""
    return _curves_picture(
        results,
        "The same losses against tokens",
        "At equal FLOPs the arms see different numbers of tokens; here each is drawn against the tokens it has seen.",
        lambda curve: curve.tokens,
        "training tokens",
    )


def _curves_picture(results: Results, title: str, caption: str, axis: Axis, label: str) -> Picture | None:
    """None where nothing was logged, or arms were validated on different texts."""
    arms = [arm for arm in results.main_arms if arm.first.training]
    if not arms or results.different_texts(VALIDATION):
        return None
    words = "; ".join(_describe(arm) for arm in arms)
    return Picture(title, caption, words, lambda: _draw_curves(arms, axis, label))


def depth_picture(results: Results) -> Picture | None:
    """Share of tokens by recursion steps taken: a bar per arm, and two where routing may differ from training's."""
    bars: list[tuple[str, list[float]]] = []
    for arm in results.main_arms:
        run = arm.first
        wanted = ("causal", "topk") if run.routed else ("causal",)
        for kind in [kind for kind in wanted if kind in run.depths] or list(run.depths):
            label = f"{arm.label}, {_DEPTH_KINDS.get(kind, kind)}" if run.routed else arm.label
            bars.append((label, run.depths[kind]))
    if not bars:
        return None
    words = [
        f"{label}: " + ", ".join(f"{numbers.percent(s, 0)} take {d}" for d, s in enumerate(shares) if s >= 0.005)
        for label, shares in bars
    ]
    return Picture(
        "Depth of tokens",
        "Share of tokens by the number of recursion steps they took, on the held-out test text where it was evaluated. "
        "Causal routing is what the model does when it generates; top-k is the selection of training.",
        "; ".join(words),
        lambda: _draw_depths(bars),
    )


def few_shot_picture(results: Results) -> Picture | None:
    """Accuracy per task with 95 % intervals and chance level. None where no task was scored alike."""
    scores = {task: values for task, values in few_shot_scores(results).items() if not results.different_texts(task)}
    if not scores:
        return None
    arms = results.main_arms
    return Picture(
        "Few-shot accuracy",
        "Accuracy with 95 % intervals (Wilson's, over the examples); the short vertical line is chance.",
        "The numbers are in the table that follows.",
        lambda: _draw_scores(arms, scores),
    )


def budget_picture(results: Results) -> Picture | None:
    """Loss of every arm at every budget. None where `Results.common_budgets` are none."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in results.experiment.arms:
        points = [
            (budget, loss)
            for budget in results.common_budgets
            if (loss := results.arm(name, budget).validation_loss("causal")[0]) is not None and 0 < loss < math.inf
        ]
        if points:
            lines[name] = points
    if not lines:
        return None
    words = [
        f"{results.label(name)}: " + ", ".join(f"{y:.3f} at {x:.3g}" for x, y in points)
        for name, points in lines.items()
    ]
    return Picture(
        "Loss at every budget",
        "Causal validation loss at the end of training with each budget of training FLOPs (both axes logarithmic).",
        "; ".join(words),
        lambda: _draw_budgets(results, lines),
    )


def _draw_curves(arms: list[Arm], axis: Axis, label: str) -> Figure:
    figure = new_figure(350)
    largest = max(axis(arm.first.training)[-1] for arm in arms) or 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    for panel, start in zip(figure.subplots(1, 2), (0.0, 0.6)):
        # A run's first steps, far above everything, would flatten the rest.
        visible = max(start, 0.06) * largest
        ends: list[tuple[float, int, str]] = []
        heights: list[float] = []
        for index, arm in enumerate(arms):
            for record in arm.runs:
                curve = _draw_run(panel, record, index, unit, axis, main=record is arm.first)
                if record is arm.first:
                    ends.append((curve.values[-1], index, arm.label))
                points = zip(axis(curve), curve.values)
                heights += [value for place, value in points if place >= visible and math.isfinite(value)]
        heights = heights or [0.0, 1.0]
        margin = 0.06 * (max(heights) - min(heights)) or 0.1
        panel.set_ylim(min(heights) - margin, max(heights) + margin)
        panel.set_xlim(start * largest / unit, 1.03 * largest / unit)
        panel.grid(axis="y")
        panel.tick_params(length=3)
        panel.set_xlabel(f"{label} ({numbers.power_of_ten(unit, 1).removeprefix('1 × ')})")
        panel.set_title("the end of training" if start else "nats per token", loc="left", color=FAINT)
        if not start:
            _legend(panel, ends)
    return figure


def _draw_run(panel: Axes, record: RunRecord, index: int, unit: float, axis: Axis, main: bool) -> Curve:
    """Draw one run and return the curve that the panel should be fitted to: validation where there is any."""
    colour = arm_colour(index)
    if main:  # the noise of one seed is enough to see
        x, y = _thin([value / unit for value in axis(record.training)], _smooth(record.training.values))
        panel.plot(x, y, color=colour, linewidth=0.9, alpha=0.4, solid_capstyle="round")
    validation = record.validation.get("causal")
    if not validation:
        return record.training
    places = [value / unit for value in axis(validation)]
    (line,) = panel.plot(places, validation.values, color=colour, linewidth=1.6 if main else 0.9)
    if main:
        line.set(marker=marker(index), markersize=5.2, markeredgecolor=PAPER, markeredgewidth=0.7)
    return validation


def _legend(panel: Axes, ends: list[tuple[float, int, str]]) -> None:
    """Names in the order of the final losses, in the corner that a falling curve leaves empty."""
    lowest_last = sorted(ends, key=lambda end: end[0] if math.isfinite(end[0]) else math.inf, reverse=True)
    for row, (_, index, label) in enumerate(lowest_last):
        top = 0.97 - 0.085 * row
        (line,) = panel.plot([0.50, 0.53, 0.56], [top] * 3, transform=panel.transAxes, markevery=[1])
        line.set(color=arm_colour(index), linewidth=1.8, marker=marker(index), markersize=5.5)
        panel.text(0.58, top, label, transform=panel.transAxes, color=INK, va="center")


def _draw_depths(bars: list[tuple[str, list[float]]]) -> Figure:
    figure = new_figure(46 + 34 * len(bars))
    panel = figure.subplots()
    for place, (_, shares) in enumerate(bars):
        left = 0.0
        for depth, share in enumerate(shares):
            colour = _DEPTH_COLOURS[min(depth, len(_DEPTH_COLOURS) - 1)]
            ink = "#222222" if depth < 3 else "#ffffff"
            if share > 0:
                panel.barh(place, share, left=left, height=0.62, color=colour, edgecolor=PAPER, linewidth=1.2)
            words = f"{depth} step{'' if depth == 1 else 's'} · " if share >= 0.14 else ""  # as far as they fit
            if share >= 0.07:
                words += numbers.percent(share, 0)
                panel.text(left + share / 2, place, words, ha="center", va="center", color=ink, fontsize=11.5)
            left += share
    panel.set_xlim(0, 1)
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    panel.set_xlabel("share of tokens, by recursion steps taken")
    _name_rows(panel, [label for label, _ in bars])
    return figure


def _draw_scores(arms: list[Arm], scores: dict[str, list[Score | None]]) -> Figure:
    figure = new_figure(70 + (22 + 13 * len(arms)) * len(scores))
    panel = figure.subplots()
    step = 0.72 / len(arms)
    marks: dict[int, Artist] = {}
    for place, values in enumerate(scores.values()):
        for index, score in enumerate(values):
            if score is None or not math.isfinite(score.value):
                continue
            y = place - 0.36 + step * (index + 0.5)
            interval = [100 * end for end in wilson_interval(score.value, score.n or 0)]
            panel.plot(interval, [y, y], color=arm_colour(index), linewidth=1.6, solid_capstyle="round")
            (mark,) = panel.plot([100 * score.value], [y], color=arm_colour(index), marker=marker(index))
            mark.set(markersize=6, markeredgecolor=PAPER, linestyle="none")
            marks[index] = mark
        chance = next((score.chance for score in values if score is not None), None)
        if chance is not None:
            panel.plot([100 * chance] * 2, [place - 0.42, place + 0.42], color=FAINT, linewidth=1.4)
    panel.set_ylim(len(scores) - 0.45, -0.55)
    panel.grid(axis="x")
    panel.set_xlabel("accuracy, %")
    _name_rows(panel, [task_name(task) for task in scores])
    legend = figure.legend(
        list(marks.values()),
        [" "] * len(marks),
        loc="outside upper left",
        ncols=len(arms),
        frameon=False,
        handletextpad=0.3,
        borderpad=0,
    )
    name_legend(legend, [arms[index].label for index in marks])
    return figure


def _name_rows(panel: Axes, names: list[str]) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.tick_params(axis="x", length=3)
    panel.spines["left"].set_visible(False)


def _draw_budgets(results: Results, lines: dict[str, list[tuple[float, float]]]) -> Figure:
    figure = new_figure(380)
    panel = figure.subplots()
    order = list(results.experiment.arms)
    for name, points in lines.items():
        index = order.index(name)
        (line,) = panel.plot(*zip(*points), color=arm_colour(index), linewidth=1.6, label=" ")
        line.set(marker=marker(index), markersize=6, markeredgecolor=PAPER)
    panel.set_xscale("log")
    panel.set_yscale("log")
    budgets = sorted({x for points in lines.values() for x, _ in points})
    panel.set_xticks(budgets, [numbers.power_of_ten(budget) for budget in budgets])
    panel.minorticks_off()
    losses = [y for points in lines.values() for _, y in points]
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(min(losses), max(losses))
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.grid(axis="y")
    panel.set_xlabel("training FLOPs")
    panel.set_title("nats per token", loc="left", color=FAINT)
    name_legend(panel.legend(frameon=False), [results.label(name) for name in lines])
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Centred moving mean over a twenty-fifth of the run."""
    half = max(1, len(values) // 50)
    return [
        sum(window) / len(window)
        for index in range(len(values))
        if (window := values[max(0, index - half) : index + half + 1])
    ]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """About 300 of the points, the last among them."""
    stride = max(1, len(x) // 300)
    kept = sorted({*range(0, len(x), stride), len(x) - 1})
    return [x[i] for i in kept], [y[i] for i in kept]


def _describe(arm: Arm) -> str:
    validation = arm.first.validation.get("causal")
    if not validation:
        return f"{arm.label} ends at a training loss of {numbers.fixed(arm.first.training.values[-1])}"
    return f"{arm.label} ends at {numbers.fixed(validation.values[-1])} after {validation.flops[-1]:.3g} FLOPs"
