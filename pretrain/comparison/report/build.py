"""From run folders to the report's files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from data_prep.files import write_text
from data_prep.plain_text import cell
from pretrain.comparison import numbers
from pretrain.comparison.report.document import compose
from pretrain.comparison.report.findings import test_difference
from pretrain.comparison.report.markdown import markdown
from pretrain.comparison.report.page import page
from pretrain.comparison.report.results import Results
from pretrain.comparison.report.spreadsheet import spreadsheet
from pretrain.comparison.report.tables import HELD_OUT, refusals
from pretrain.errors import RunError


def write_report(results: Results, experiment_file: str) -> Path:
    """Write index.html, report.md and report.csv into the experiment's report folder; not all of its runs need exist.

    Returns:
        The path of index.html.

    Raises:
        RunError: the folder cannot be written.
    """
    document = compose(results, experiment_file)
    folder = results.experiment.report_folder
    files = {"report.csv": spreadsheet(results), "report.md": markdown(document), "index.html": page(document)}
    try:
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise RunError(
            f"{folder}: the report cannot be written ({error.strerror or error}); make room or the folder writable and "
            f"start `mor compare report {experiment_file}`. The runs are as they were."
        ) from None
    return folder / "index.html"


def print_results(results: Results, console: Console) -> None:
    """The short form for a terminal: a line per arm, what is missing and what does not compare."""
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    for head in ("stored", "tokens", "FLOPs", "test loss", "bits/byte", "against", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    reference = results.reference(results.main_budget)
    alike = results.different_texts(HELD_OUT) is None
    for arm in results.main_arms:
        loss, bits = (arm.mean_score(HELD_OUT, metric)[0] if alike else None for metric in ("loss", "bits_per_byte"))
        found = test_difference(results, arm, reference) if reference is not None else None
        run = arm.first
        table.add_row(
            cell(arm.label),
            numbers.si(run.parameters["total_stored"]),
            numbers.si(run.tokens),
            f"{run.counted_flops:.3g}" if run.counted_flops else "–",
            numbers.fixed(loss, 4),
            numbers.fixed(bits, 4),
            "" if reference and arm.name == reference.name else numbers.signed(found[0].value if found else None, 4),
            numbers.whole(run.tokens_per_second),
        )
    console.print(table)
    for problem in [*results.problems, *refusals(results)]:
        console.print(cell(f"incomplete: {problem}", style="yellow"), soft_wrap=True)
