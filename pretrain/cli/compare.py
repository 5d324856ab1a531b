"""`mor compare`: plan, run and report a comparison of several arms at one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.plain_text import say

if TYPE_CHECKING:
    from pretrain.comparison.experiment import Experiment

app = typer.Typer(
    help="Plan, run and report a FLOPs-matched comparison.", no_args_is_help=True, pretty_exceptions_enable=False
)

_File = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment YAML, such as recipes/quickstart.yaml.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides: base.optim.lr=1e-3 data.corpus=books/*.jsonl"),
]
_Arms = Annotated[
    list[str] | None, typer.Option("--arm", "--arms", help="Only this arm; may be repeated, or a list a,b.")
]


@app.command()
def plan(experiment: _File, overrides: _Overrides = None, arms: _Arms = None) -> None:
    """Print parameters, FLOPs, tokens and steps of every run, and train nothing."""
    from rich.console import Console

    from pretrain.comparison.experiment import load_experiment
    from pretrain.comparison.planned_runs import plan_experiment, plan_table

    loaded = load_experiment(experiment, overrides)
    Console().print(plan_table(plan_experiment(loaded, _split(arms))))


@app.command()
def run(experiment: _File, overrides: _Overrides = None, arms: _Arms = None) -> None:
    """Prepare data, train and evaluate every arm, and write the report. Started again, it continues."""
    from pretrain.comparison.experiment import load_experiment
    from pretrain.comparison.launch import Interrupted
    from pretrain.comparison.run_experiment import run_experiment
    from pretrain.ranks.signals import EXIT_AGAIN

    loaded = load_experiment(experiment, overrides)
    try:
        failures = run_experiment(loaded, _split(arms))
    except Interrupted:
        say("Stopped; the same command continues where this one was.", error=True)
        raise typer.Exit(EXIT_AGAIN) from None
    _report(loaded, experiment)
    if failures:
        raise typer.Exit(1)


@app.command()
def report(experiment: _File, overrides: _Overrides = None) -> None:
    """Write the report again from the run folders. Arms that are missing are named in it."""
    from pretrain.comparison.experiment import load_experiment

    _report(load_experiment(experiment, overrides), experiment)


def _report(experiment: Experiment, file: str) -> None:
    """Print the results before the report is drawn and written: they are there even when it cannot be."""
    from rich.console import Console

    from pretrain.comparison.report.build import print_results, write_report
    from pretrain.comparison.report.results import read_results

    results = read_results(experiment)
    print_results(results, Console())
    say(f"report: {write_report(results, file)}")


def _split(arms: list[str] | None) -> list[str] | None:
    return [name for given in arms for name in given.split(",") if name] if arms else None
