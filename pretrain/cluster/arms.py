"""An experiment for batch scripts: list its arms and folders, or prepare its text and its runs' recipe files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from data_prep.errors import DataError
from data_prep.files import write_text
from data_prep.plain_text import say
from mor_model.errors import ConfigError
from pretrain.comparison.experiment import Experiment, load_experiment
from pretrain.comparison.experiment_data import prepare_data
from pretrain.comparison.launch import Interrupted
from pretrain.comparison.planned_runs import jobs, plan_experiment
from pretrain.errors import LaunchError, UserError
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_USER


def recipe_file(experiment: Experiment, run: str) -> Path:
    """Where the recipe of one of the experiment's runs is written."""
    return experiment.folder / "recipes" / f"{run}.yaml"


def main(arguments: list[str]) -> int:
    """`list` or `prepare`, EXPERIMENT [KEY=VALUE ...]; returns the exit code."""
    try:
        if len(arguments) < 2 or arguments[0] not in ("list", "prepare"):
            raise LaunchError("usage: python -m pretrain.cluster.arms list|prepare EXPERIMENT [KEY=VALUE ...]")
        experiment = load_experiment(arguments[1], arguments[2:])
        if arguments[0] == "list":
            places = {"folder": str(experiment.folder), "data": str(experiment.data_path)}
            print(json.dumps({"arms": list(experiment.arms), **places}))
            return EXIT_FINISHED
        prepare_data(experiment, Console(stderr=True))
        for run, *_branches in jobs(plan_experiment(experiment)):
            file = recipe_file(experiment, run.trial.folder.name)
            write_text(file, run.recipe.to_yaml())
            say(f"{file}: {run.plan.steps} steps, {run.plan.training_flops:.3g} FLOPs")
    except Interrupted:
        return EXIT_AGAIN
    except (UserError, DataError, ConfigError) as error:
        say(f"compare: {error}", error=True)
        return EXIT_USER
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
