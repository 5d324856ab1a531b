"""`mor runs`: a table of run folders with state, progress, last loss and what is left."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.run_folder import RunFolder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="List run folders.")

_SILENT_SECONDS = 900.0
_REASON_LENGTH = 100


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders, at any depth.")] = Path("runs"),
) -> None:
    """Show every run below FOLDER."""
    from rich.console import Console
    from rich.table import Table

    found = find_runs(folder)
    if not found:
        typer.echo(f"{folder}: holds no run folders (a run folder has a recipe.yaml).")
        return
    table = Table()
    for name in ("run", "state", "step", "loss", "validation", "tokens/s", "left"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for run in found:
        table.add_row(*describe(run, str(run.path.relative_to(folder)) if run.path != folder else str(folder)))
    Console().print(table)


def find_runs(folder: Path) -> list[RunFolder]:
    """Run folders below (or at) `folder`, by path; links are followed, and of a run only its branches are looked
    into.
    """
    from pretrain.run_folder import RunFolder

    found, seen = [], set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to what was listed, or in a circle
            folders.clear()
            continue
        seen.add(real)
        if "recipe.yaml" in files:
            found.append(Path(path))
            folders[:] = [name for name in folders if name == "branches"]
    return [RunFolder(path) for path in sorted(found)]


def describe(run: RunFolder, name: str) -> list[str]:
    """One row: name, state, progress, last training loss, last causal validation loss, tokens/s, time left."""
    from pretrain.errors import RunError

    try:
        return [name, *_facts(run)]
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # One damaged folder must not hide the others, whatever its files hold instead of what they should.
        what = error if isinstance(error, (RunError, OSError)) else f"a file holds what it should not ({error!r})"
        return [name, f"damaged: {what}", *["-"] * 5]


def _facts(run: RunFolder) -> list[str]:
    from pretrain.telemetry import format_seconds

    status = run.status()
    steps = int(run.plan()["steps"]) if run.plan_file.is_file() else 0
    last: dict[str, dict[str, Any]] = {}
    if run.metrics_file.is_file():
        for record in run.metrics():
            last[record["kind"]] = record
    train = last.get("train", {})
    state = str(status["state"])
    if state == "running" and run.metrics_file.is_file():
        silent = time.time() - run.metrics_file.stat().st_mtime
        if silent > _SILENT_SECONDS:
            state = f"silent for {format_seconds(silent)}"
    if "reason" in status:
        state += f": {textwrap.shorten(status['reason'], _REASON_LENGTH, placeholder=' ...')}"
    step = int(train.get("step", status.get("step", 0)))
    left = (steps - step) * float(train.get("step_seconds", 0.0))
    return [
        state,
        f"{step}/{steps}" if steps else "-",
        _loss(train, "lm_loss"),
        _loss(last.get("validation", {}), "loss_causal"),
        f"{train['tokens_per_second']:,.0f}" if train else "-",
        format_seconds(left) if state == "running" and train else "-",
    ]


def _loss(record: dict[str, Any], key: str) -> str:
    # JSON has no number for a loss that is not finite; records hold null there.
    return "-" if key not in record else "not finite" if record[key] is None else f"{record[key]:.4f}"
