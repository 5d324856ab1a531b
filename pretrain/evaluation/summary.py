"""Evaluation results as a table: one row a suite, one column a run."""

from __future__ import annotations

import math
from typing import Any

from data_prep.plain_text import cell, markdown_text

Results = dict[str, dict[str, dict[str, Any]]]
"""By run name, by suite: what `evaluate.evaluate_run` returns."""


def summary_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows; an arrow behind the metric says which direction is better."""
    header = ["suite", "metric", "n", "chance", *results]
    suites = list(dict.fromkeys(suite for by_suite in results.values() for suite in by_suite))
    rows = []
    for suite in suites:
        found = [by_suite.get(suite) for by_suite in results.values()]
        figures = [_shown(result) for result in found]
        for metric in dict.fromkeys(metric for shown in figures for metric in shown):
            row = [shown.get(metric) for shown in figures]
            known = next(figure for figure in row if figure)
            counts = sorted({figure["n"] for figure in row if figure})
            rows.append(
                [
                    suite,
                    f"{metric} {'↑' if known['higher_is_better'] else '↓'}",
                    "/".join(map(str, counts)),
                    "" if known["chance"] is None else f"{known['chance']:.2f}",
                    *(_cell(figure, result) for figure, result in zip(row, found)),
                ]
            )
    return header, rows


def _shown(result: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The figures of a suite that a table shows, by metric: its primary one and, where there is a router, the leak."""
    if result is None or result["primary"] is None:
        return {}
    figure = result["primary"]
    shown = {figure["metric"]: figure}
    task = result["tasks"][figure["task"]]
    if "leak" in task["metrics"]:
        shown["leak"] = {**figure, "value": task["metrics"]["leak"], "stderr": task["stderr"]["leak"]}
    return shown


def _cell(figure: dict[str, Any] | None, result: dict[str, Any] | None) -> str:
    if figure is None:
        return "skipped" if result and result["primary"] is None else ""
    task = (result or {}).get("tasks", {}).get(figure["task"], {})
    if figure["value"] is None:
        if count := task.get("not_finite"):
            return f"not finite ({count} of {task['n']})"
        lost = task.get("lost_bytes")
        return f"refused ({_percent(lost, task['scored_bytes'])} of the text lost)" if lost else "not finite"
    error = figure["stderr"]
    digits = 4 if error is None or error <= 0 else min(6, max(2, 1 - math.floor(math.log10(error))))
    value = f"{figure['value']:.{digits}f}"
    cut = f" ({task['prompts_cut']} of {task['n']} prompts cut)" if task.get("prompts_cut") else ""
    return f"{value}{cut}" if error is None else f"{value} ± {error:.{digits}f}{cut}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / max(whole, 1)
    return f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def warning_lines(results: Results) -> list[str]:
    """One sentence for every result without numbers, with text that the tokenizer lost or with cut prompts."""
    lines = []
    for run, by_suite in results.items():
        for suite, result in by_suite.items():
            task = result["tasks"].get(suite, {})
            where = f"Warning: {run}: {suite}"
            if count := task.get("not_finite"):
                lines.append(
                    f"{where}: the network gives no finite likelihood for {count} of {task['n']}; what is counted from "
                    "them is 'not finite'. Its training has diverged: lower optim.lr in a new run."
                )
            if lost := task.get("lost_bytes"):
                lines.append(
                    f"{where}: the tokenizer loses {_percent(lost, task['scored_bytes'])} of the text's bytes (unknown "
                    "or changed characters), so bits per byte, byte and word perplexity say nothing and are refused."
                )
            if cut := task.get("prompts_cut"):
                examples = f", so fewer than the {task['fewshot']} examples were read" if task.get("fewshot") else ""
                lines.append(
                    f"{where}: {cut} of {task['n']} prompts are longer than the context and lost their "
                    f"beginning{examples}."
                )
    return lines


def skipped_lines(results: Results) -> list[str]:
    """One sentence for each reason to skip suites or tasks: which, and what to do."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for by_suite in results.values():
        for suite, result in by_suite.items():
            for entry in result["skipped"]:
                what = entry["task"] if result["tasks"] else suite
                reasons.setdefault((entry["why"], entry["how"]), {})[what] = None
    return [f"Skipped: {', '.join(what)}, because {why}; {how}" for (why, how), what in reasons.items()]


def markdown_summary(results: Results) -> str:
    """The table, the warnings and the skipped suites in Markdown."""
    header, rows = summary_rows(results)
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in [header, [":---"] * len(header), *rows]]
    notes = [*warning_lines(results), *skipped_lines(results)]
    return "\n".join([*lines, "", *(f"- {markdown_text(line)}" for line in notes)]).rstrip() + "\n"


def print_summary(results: Results) -> None:
    """Print the table to standard output and, below it, warnings and what was skipped."""
    from rich.console import Console
    from rich.table import Table

    header, rows = summary_rows(results)
    table = Table()
    for name in header:
        table.add_column(cell(name))
    for row in rows:
        table.add_row(*map(cell, row))
    console = Console()
    console.print(table)
    for line in [*warning_lines(results), *skipped_lines(results)]:
        console.print(cell(line, style="yellow"))
