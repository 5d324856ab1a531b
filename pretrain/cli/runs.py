"""`mor runs`: a table of run folders with state, progress, last loss and what is left."""

from __future__ import annotations

import math
import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.records.fields import Fields
    from pretrain.records.run_folder import RunFolder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="List run folders.")

_NOT_FINITE = "not finite"


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders, at any depth.")] = Path("runs"),
) -> None:
    """Show every run below FOLDER."""
    from rich.console import Console
    from rich.table import Table

    from data_prep.plain_text import cell, say

    found = find_runs(folder)
    if not found:
        say(f"{folder}: holds no run folders (a run folder has a recipe.yaml).")
        return
    table = Table()
    for name in ("run", "state", "step", "loss", "validation", "tokens/s", "left"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for run in found:
        row = describe(run, str(run.path.relative_to(folder)) if run.path != folder else str(folder))
        table.add_row(*map(cell, row))
    Console().print(table)


def find_runs(folder: Path) -> list[RunFolder]:
    """Run folders at or below `folder`, sorted by path; links are followed, and inside a run only its branches."""
    from pretrain.records.run_folder import RunFolder

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
    except (RunError, OSError) as error:
        # One damaged folder must not hide the others.
        return [name, f"damaged: {error}", *["-"] * 5]


def _facts(run: RunFolder) -> list[str]:
    from data_prep.terminal import duration
    from pretrain.records.fields import Fields

    status = run.status()
    steps = int(Fields(run.plan(), run.plan_file).amount("steps")) if run.plan_file.is_file() else 0
    records = run.metrics() if run.metrics_file.is_file() else []
    last: dict[str, dict[str, Any]] = {record["kind"]: record for record in records}
    train, validation = (Fields(last.get(kind, {}), f"{run.metrics_file}: {kind}") for kind in ("train", "validation"))
    state, loss = status.get("state", "absent"), _loss(train, "lm_loss")
    if state == "running" and run.metrics_file.is_file():
        silent = time.time() - run.metrics_file.stat().st_mtime
        if silent > 900:
            state = f"silent for {duration(silent)}"
    if state == "finished" and loss == _NOT_FINITE:
        state = "finished, its loss is not finite"
    if "reason" in status:
        state += f": {textwrap.shorten(str(status['reason']), 100, placeholder=' ...')}"
    step = train.values.get("step", status.get("step", 0))
    speed, seconds = train.amount("tokens_per_second", None), train.amount("step_seconds", None)
    going = state == "running" and seconds is not None
    return [
        state,
        f"{step}/{steps}" if steps else "-",
        loss,
        _loss(validation, "loss_causal"),
        f"{speed:,.0f}" if speed is not None else "-",
        duration((steps - step) * seconds) if going else "-",
    ]


def _loss(record: Fields, key: str) -> str:
    loss = record.number(key, None)
    if loss is None:
        return "-"
    return (f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.3g}") if math.isfinite(loss) else _NOT_FINITE
