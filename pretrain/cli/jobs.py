"""`mor jobs`: follow what was submitted."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)


@app.command()
def jobs(
    everything: Annotated[bool, typer.Option("--all", help="Also jobs submitted more than a day ago.")] = False,
    follow: Annotated[
        float | None, typer.Option(min=1, help="Show them again every FOLLOW seconds, until all have ended.")
    ] = None,
) -> None:
    """Show state, step, loss, time left and log of the jobs that `mor submit` sent."""
    from rich.console import Console

    console = Console(highlight=False)
    while _show(console, everything) and follow is not None:
        time.sleep(follow)


def _show(console: Console, everything: bool) -> bool:
    """Print the table; whether a job has not ended yet."""
    from rich.table import Table

    from data_prep.plain_text import cell, say
    from data_prep.terminal import duration
    from pretrain.cluster.job_records import remembered
    from pretrain.cluster.jobs import view_jobs

    everyone = remembered(functools.partial(say, error=True))
    recent = [record for record in everyone if everything or record.time > time.time() - 86400]
    views = view_jobs(recent)
    if not views:
        console.print("No jobs were submitted from here in the last day (mor jobs --all shows older ones).")
        return False
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("job", "name", "state", "step", "loss", "left", "log"):
        table.add_column(head, justify="right" if head in ("step", "loss", "left") else "left", overflow="fold")
    for view in views:
        progress = f"{view.step or 0:,}/{view.steps:,}" if view.steps else ""
        progress += f" of branch {view.branch}" if view.branch else ""
        state = f"{view.state} ({view.reason})" if view.reason and view.state != "RUNNING" else view.state
        loss = "" if view.loss is None else f"{view.loss:.4f}" if math.isfinite(view.loss) else "not finite"
        left = duration(view.remaining) if view.remaining is not None else ""
        row = (view.record.job, view.record.name, state, progress, loss, left, view.record.log)
        table.add_row(*map(cell, row))
    console.print(table)
    return any(view.state in ("PENDING", "RUNNING", "COMPLETING") for view in views)
