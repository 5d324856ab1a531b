"""`mor train`: train one recipe in this process; launchers start `pretrain/train.py` with the same arguments."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Train one recipe.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Recipe values to replace.")
    ] = None,
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Run folder, instead of the recipe's.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the resolved recipe and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate memory and time, and stop.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="STEPS", help="Profile these steps (5-7, counted from 1) into RUN/profile."),
    ] = None,
) -> None:
    """Train RECIPE, or go on where it stopped. On several devices: deepspeed pretrain/train.py --config RECIPE."""
    from pretrain.ranks.environment import prepare_environment
    from pretrain.train import leave
    from pretrain.train import train as run

    ranks = prepare_environment()
    code = run(recipe, overrides or [], ranks, run_dir=run_dir, print_only=print_only, dry_run=dry_run, profile=profile)
    leave(code)
