"""The report's pictures: curves, bars of depth, intervals of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.comparison import numbers
from pretrain.comparison.report.drawing import (
    FAINT,
    INK,
    PAPER,
    Picture,
    arm_colour,
    make_picture,
    marker,
    name_legend,
    new_figure,
)
from pretrain.comparison.report.results import VALIDATION, Arm, Results
from pretrain.comparison.report.statistics import wilson_interval
from pretrain.comparison.report.tables import few_shot_scores, task_name
from pretrain.comparison.run_records import Curve, RunRecord
from pretrain.comparison.scores import Score

# One hue, light to dark with depth, and the text that can be read on it; the same by day and by night.
_DEPTH_COLOURS = ("#d9dde2", "#c6dcf0", "#74aed6", "#2b6ca8", "#0d3c6e", "#08264a", "#051a33")
_DEPTH_TEXT = ("#222222", "#222222", "#222222", "#ffffff", "#ffffff", "#ffffff", "#ffffff")
_DEPTH_KINDS = {"causal": "causal", "topk": "top-k", "training": "in training"}
_POINTS = 300


def loss_picture(results: Results, budget: float | None) -> Picture | None:
    """Loss against counted training FLOPs: the whole run, and its end magnified. None where nothing was logged, or
    arms were validated on different texts.
    """
    arms = _with_curves(results, budget)
    if not arms:
        return None
    largest = max(arm.first.training.flops[-1] for arm in arms)
    return make_picture(
        "Loss against training FLOPs",
        "Validation loss with causal routing (marks) and training loss, smoothed (thin lines), in nats per token, "
        "against training FLOPs as "
        "counted. The second panel is the end of the first, magnified.",
        "; ".join(_describe(arm) for arm in arms),
        lambda width: _draw_curves(arms, width, largest, lambda curve: curve.flops, "training FLOPs"),
    )


def tokens_picture(results: Results, budget: float | None) -> Picture | None:
    """The same losses against tokens seen."""
    arms = _with_curves(results, budget)
    if not arms:
        return None
    largest = max(arm.first.training.tokens[-1] for arm in arms)
    return make_picture(
        "The same losses against tokens",
        "At equal FLOPs the arms see different numbers of tokens; here each is drawn against the tokens it has seen.",
        "; ".join(_describe(arm) for arm in arms),
        lambda width: _draw_curves(arms, width, largest, lambda curve: curve.tokens, "training tokens"),
    )


def _with_curves(results: Results, budget: float | None) -> list[Arm]:
    if results.different_texts(budget, VALIDATION):
        return []
    return [arm for arm in results.arms(budget) if arm.first.training]


def depth_picture(results: Results, budget: float | None) -> Picture | None:
    """Share of tokens by recursion steps taken: a bar per arm, and two where routing may differ from training's."""
    bars: list[tuple[str, list[float]]] = []
    for arm in results.arms(budget):
        run = arm.first
        wanted = ("causal", "topk") if run.routed else ("causal",)
        kinds = [kind for kind in wanted if kind in run.depths] or list(run.depths)
        bars += [
            (f"{arm.label}, {_DEPTH_KINDS.get(kind, kind)}" if run.routed else arm.label, run.depths[kind])
            for kind in kinds
        ]
    if not bars:
        return None
    words = [
        f"{label}: " + ", ".join(f"{numbers.percent(s, 0)} take {d}" for d, s in enumerate(shares) if s >= 0.005)
        for label, shares in bars
    ]
    return make_picture(
        "Depth of tokens",
        "Share of tokens by the number of recursion steps they took, on the held-out test text where it was evaluated. "
        "Causal routing is what the model does when it generates; top-k is the selection of training.",
        "; ".join(words),
        lambda width: _draw_depths(bars, width),
    )


def few_shot_picture(results: Results, budget: float | None) -> Picture | None:
    """Accuracy per task with 95 % intervals and chance level. None where no task was scored alike."""
    scores = {
        task: values
        for task, values in few_shot_scores(results, budget).items()
        if not results.different_texts(budget, task)
    }
    if not scores:
        return None
    arms = results.arms(budget)
    return make_picture(
        "Few-shot accuracy",
        "Accuracy with 95 % intervals (Wilson's, over the examples); the short vertical line is chance.",
        "The numbers are in the table that follows.",
        lambda width: _draw_scores(arms, scores, width),
    )


def budget_picture(results: Results, value: Callable[[Arm], float | None]) -> Picture | None:
    """Loss of every arm at every budget. None with fewer than two budgets, or where arms were validated on different
    texts.
    """
    budgets = sorted(budget for budget in results.budgets if budget is not None)
    if len(budgets) < 2 or any(results.different_texts(budget, VALIDATION) for budget in budgets):
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in results.experiment.arms:
        points = [
            (budget, loss)
            for budget in budgets
            if (arm := results.arm(name, budget)).runs and (loss := value(arm)) is not None and 0 < loss < math.inf
        ]
        if points:
            lines[name] = points
    if not lines:
        return None
    labels = {name: results.label(name) for name in lines}
    order = list(results.experiment.arms)
    return make_picture(
        "Loss at every budget",
        "Causal validation loss at the end of training with each budget of training FLOPs (both axes logarithmic).",
        "; ".join(
            f"{labels[name]}: " + ", ".join(f"{y:.3f} at {x:.3g}" for x, y in points) for name, points in lines.items()
        ),
        lambda width: _draw_budgets(lines, labels, order, width),
    )


def _draw_curves(
    arms: list[Arm], width: int, largest: float, axis: Callable[[Curve], list[float]], label: str
) -> Figure:
    narrow = width < 600
    figure = new_figure(width, 620 if narrow else 350)
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    largest = largest or 1.0
    unit = 10.0**exponent
    for panel, start in zip(panels, (0.0, 0.6)):
        # A run's first steps, far above everything, would flatten the rest.
        visible = max(start, 0.06) * largest
        ends: list[tuple[float, int, str]] = []
        heights: list[float] = []
        for index, arm in enumerate(arms):
            for record in arm.runs:
                main = record is arm.first
                curve = _draw_run(panel, record, index, unit, axis, main)
                if main:
                    ends.append((curve.values[-1], index, arm.label))
                points = zip(axis(curve), curve.values)
                heights += [value for place, value in points if place >= visible and math.isfinite(value)]
        heights = heights or [0.0, 1.0]
        margin = 0.06 * (max(heights) - min(heights)) or 0.1
        panel.set_ylim(min(heights) - margin, max(heights) + margin)
        panel.set_xlim(start * largest / unit, 1.03 * largest / unit)
        panel.grid(axis="y")
        panel.tick_params(length=3)
        panel.set_xlabel(f"{label} ({_ten(exponent)})")
        panel.set_title("the end of training" if start else "nats per token", loc="left", color=FAINT)
        if not start:
            _legend(panel, ends)
    return figure


def _draw_run(
    panel: Axes, record: RunRecord, index: int, unit: float, axis: Callable[[Curve], list[float]], main: bool
) -> Curve:
    """Draw one run and return the curve that the panel should be fitted to: validation where there is any."""
    colour = arm_colour(index)
    if main:  # the noise of one seed is enough to see
        x, y = _thin([value / unit for value in axis(record.training)], _smooth(record.training.values))
        panel.plot(x, y, color=colour, linewidth=0.9, alpha=0.4, solid_capstyle="round")
    validation = record.validation.get("causal")
    if not validation:
        return record.training
    places = [value / unit for value in axis(validation)]
    marks: dict[str, Any] = {
        "marker": marker(index),
        "markersize": 5.2,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.7,
    }
    panel.plot(places, validation.values, color=colour, linewidth=1.6 if main else 0.9, **(marks if main else {}))
    return validation


def _legend(panel: Axes, ends: list[tuple[float, int, str]]) -> None:
    """Names in the order of the final losses, in the corner that a falling curve leaves empty."""
    lowest_last = sorted(ends, key=lambda end: end[0] if math.isfinite(end[0]) else math.inf, reverse=True)
    for row, (_, index, label) in enumerate(lowest_last):
        top = 0.97 - 0.085 * row
        style: dict[str, Any] = {
            "color": arm_colour(index),
            "linewidth": 1.8,
            "marker": marker(index),
            "markersize": 5.5,
        }
        panel.plot([0.50, 0.53, 0.56], [top] * 3, transform=panel.transAxes, markevery=[1], **style)
        panel.text(0.58, top, label, transform=panel.transAxes, color=INK, va="center")


def _draw_depths(bars: list[tuple[str, list[float]]], width: int) -> Figure:
    narrow = width < 600
    figure = new_figure(width, 46 + (46 if narrow else 34) * len(bars))
    panel = figure.subplots()
    for place, (label, shares) in enumerate(bars):
        left = 0.0
        for depth, share in enumerate(shares):
            tone = min(depth, len(_DEPTH_COLOURS) - 1)
            style: dict[str, Any] = {"color": _DEPTH_COLOURS[tone], "edgecolor": PAPER, "linewidth": 1.2}
            if share > 0:
                panel.barh(place, share, left=left, height=0.5 if narrow else 0.62, **style)
            panel.text(
                left + share / 2,
                place,
                _depth_words(depth, share, narrow),
                ha="center",
                va="center",
                color=_DEPTH_TEXT[tone],
                fontsize=11.5,
            )
            left += share
        if narrow:
            panel.text(0, place - 0.3, label, va="bottom", ha="left", fontsize=12)
    panel.set_xlim(0, 1)
    panel.set_ylim(len(bars) - 0.5, -0.75 if narrow else -0.5)
    panel.set_yticks([] if narrow else range(len(bars)), [] if narrow else [label for label, _ in bars])
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.tick_params(axis="x", length=3)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("share of tokens, by recursion steps taken")
    return figure


def _depth_words(depth: int, share: float, narrow: bool) -> str:
    """What fits into a bar of this share."""
    share_words = numbers.percent(share, 0)
    if share < (0.16 if narrow else 0.07):
        return ""
    if narrow:
        return f"{depth}: {share_words}"
    return f"{depth} step{'' if depth == 1 else 's'} · {share_words}" if share >= 0.14 else share_words


def _draw_scores(arms: list[Arm], scores: dict[str, list[Score | None]], width: int) -> Figure:
    narrow = width < 600
    row = 22 + 13 * len(arms)
    figure = new_figure(width, 70 + row * len(scores))
    panel = figure.subplots()
    step = 0.72 / max(1, len(arms))
    marks: dict[int, Artist] = {}
    for place, values in enumerate(scores.values()):
        for index, score in enumerate(values):
            if score is None or not math.isfinite(score.value):
                continue
            y = place - 0.36 + step * (index + 0.5)
            interval = [100 * end for end in wilson_interval(score.value, score.n or 0)]
            colour = arm_colour(index)
            panel.plot(
                interval,
                [y, y],
                color=colour,
                linewidth=1.6,
                solid_capstyle="round",
            )
            (marks[index],) = panel.plot(
                [100 * score.value],
                [y],
                color=colour,
                marker=marker(index),
                markersize=6,
                markeredgecolor=PAPER,
                linestyle="none",
            )
        chance = next((score.chance for score in values if score is not None), None)
        if chance is not None:
            panel.plot([100 * chance] * 2, [place - 0.42, place + 0.42], color=FAINT, linewidth=1.4)
    panel.set_yticks(range(len(scores)), [task_name(task) for task in scores])
    panel.set_ylim(len(scores) - 0.45, -0.55)
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.tick_params(axis="x", length=3)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="x")
    panel.set_xlabel("accuracy, %")
    legend = figure.legend(
        list(marks.values()),
        [" "] * len(marks),
        loc="outside upper left",
        ncols=2 if narrow else len(arms),
        frameon=False,
        handletextpad=0.3,
        borderpad=0,
    )
    name_legend(legend, [arms[index].label for index in marks])
    return figure


def _draw_budgets(
    lines: dict[str, list[tuple[float, float]]], labels: dict[str, str], order: list[str], width: int
) -> Figure:
    figure = new_figure(width, 380)
    panel = figure.subplots()
    for name, points in lines.items():
        index = order.index(name)
        panel.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=arm_colour(index),
            marker=marker(index),
            markersize=6,
            markeredgecolor=PAPER,
            linewidth=1.6,
            label=" ",
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    budgets = sorted({x for points in lines.values() for x, _ in points})
    panel.set_xticks(budgets, [numbers.power_of_ten(budget) for budget in budgets])
    panel.minorticks_off()
    losses = [y for points in lines.values() for _, y in points]
    ticks = _round_ticks(min(losses), max(losses))
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.grid(axis="y")
    panel.set_xlabel("training FLOPs")
    panel.set_title("nats per token", loc="left", color=FAINT)
    name_legend(panel.legend(frameon=False), list(labels.values()))
    return figure


def _round_ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1e9) if (high - low) / step <= 7)
    first = math.floor(low / step)
    return [round((first + index) * step, 6) for index in range(math.ceil(high / step) - first + 1)]


def _smooth(values: list[float]) -> list[float]:
    """Centred moving mean over a twenty-fifth of the run."""
    half = max(1, len(values) // 50)
    return [
        sum(window) / len(window)
        for index in range(len(values))
        if (window := values[max(0, index - half) : index + half + 1])
    ]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    stride = max(1, len(x) // _POINTS)
    kept = sorted({*range(0, len(x), stride), len(x) - 1})
    return [x[i] for i in kept], [y[i] for i in kept]


def _ten(exponent: int) -> str:
    return numbers.power_of_ten(10.0**exponent, 1).removeprefix("1 × ")


def _describe(arm: Arm) -> str:
    validation = arm.first.validation.get("causal")
    if not validation:
        return f"{arm.label} ends at a training loss of {numbers.fixed(arm.first.training.values[-1])}"
    return f"{arm.label} ends at {numbers.fixed(validation.values[-1])} after {validation.flops[-1]:.3g} FLOPs"
