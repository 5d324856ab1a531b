"""From run folders to the report's files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from data_prep.files import write_text
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.report import numbers
from pretrain.comparison.report.document import compose
from pretrain.comparison.report.findings import test_difference
from pretrain.comparison.report.markdown import markdown
from pretrain.comparison.report.page import page
from pretrain.comparison.report.results import Results, read_results
from pretrain.comparison.report.spreadsheet import spreadsheet
from pretrain.comparison.report.tables import HELD_OUT


def build_report(experiment: Experiment, experiment_file: str) -> tuple[Results, Path]:
    """Write index.html, report.md and report.csv into the experiment's report folder, whatever part of its runs exists.

    Returns:
        What was read, and the path of index.html.
    """
    results = read_results(experiment)
    document = compose(results, experiment_file)
    folder = experiment.report_folder
    index = folder / "index.html"
    write_text(folder / "report.csv", spreadsheet(results))
    write_text(folder / "report.md", markdown(document))
    write_text(index, page(document))
    return results, index


def print_report(results: Results, index: Path, console: Console) -> None:
    """The short form for a terminal: a line per arm, what is missing, and where the report is."""
    budget = results.main_budget
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    for head in ("stored", "tokens", "FLOPs", "test loss", "bits/byte", "against", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    reference = results.reference(budget)
    for arm in results.arms(budget):
        loss, _, _ = arm.mean_score(HELD_OUT, "loss")
        bits, _, _ = arm.mean_score(HELD_OUT, "bits_per_byte")
        found = None
        if reference is not None and arm.name != reference.name:
            found = test_difference(results, arm, reference)
        run = arm.first
        table.add_row(
            arm.label,
            numbers.si(run.parameters["total_stored"]),
            numbers.si(run.tokens),
            f"{run.counted_flops:.3g}" if run.counted_flops else "–",
            numbers.fixed(loss, 4),
            numbers.fixed(bits, 4),
            numbers.signed(found[0].value, 4) if found else "",
            numbers.whole(run.tokens_per_second),
        )
    console.print(table)
    for problem in results.problems:
        console.print(f"incomplete: {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {index}", highlight=False, markup=False, soft_wrap=True)
