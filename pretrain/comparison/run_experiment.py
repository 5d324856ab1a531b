"""Run an experiment: prepare data where they are missing, then train and evaluate each run in turn.

What is done is read from the run folders, so the same command continues where it was stopped and repeats nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from data_prep.files import write_text
from data_prep.reading.manifest import read_manifest
from data_prep.terminal import ProgressBars
from pretrain.comparison import numbers
from pretrain.comparison.arms_progress import ArmsProgress
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.experiment_data import prepare_data
from pretrain.comparison.launch import Interrupted, evaluation_arguments, last_lines, run_child, training_command
from pretrain.comparison.planned_runs import PlannedRun, jobs, other_recipe, plan_experiment, plan_table
from pretrain.comparison.run_records import read_run
from pretrain.errors import RunError
from pretrain.evaluation.identity import is_current
from pretrain.evaluation.settings import TEXT_BYTES, Settings
from pretrain.evaluation.suites import check_suites
from pretrain.records.finished import has_finished
from pretrain.records.run_folder import RunFolder, require_writable


def run_experiment(experiment: Experiment, arms: list[str] | None = None) -> list[str]:
    """Train and evaluate every run of the experiment, or of some arms. A run that fails does not stop the others.

    Returns:
        The runs that failed and why, empty when all is well.

    Raises:
        RecipeError, DataError: when the experiment cannot run at all; nothing has been trained then.
        RunError: when the experiment's folder cannot be written, or a run folder holds a run of another recipe.
        Interrupted: after a signal, with everything saved.
    """
    console = Console(stderr=True)
    require_writable(experiment.folder)
    prepare_data(experiment, console)
    planned = plan_experiment(experiment, arms)
    for run in planned:
        _refuse_other_run(run)
    console.print(plan_table(planned))
    failures = []
    to_train = jobs(planned)
    with ProgressBars(every=20.0) as bars:
        progress = ArmsProgress([run for job in to_train for run in job], bars)
        for job in to_train:
            failure = _train(experiment, job, progress)
            for run in job:
                failure = failure or _evaluate(experiment, run, progress)
            if failure is not None:
                failures.append(failure)
                bars.say(failure)
    return failures


def _refuse_other_run(run: PlannedRun) -> None:
    """Raise `RunError` when the run folder was begun with another recipe than the experiment's, or on other data."""
    folder = RunFolder(run.trial.folder)
    if not folder.recipe_file.is_file():
        return
    if (difference := other_recipe(run)) is not None:
        raise RunError(difference)
    data = run.recipe.data.path
    if (
        data is not None
        and folder.plan_file.is_file()
        and folder.plan().get("data_manifest") != read_manifest(Path(data)).digest()
    ):
        raise RunError(
            f"{folder}: was trained on other data than {data} holds now; remove that folder to train this arm again, "
            "or give the experiment a name of its own (name=NAME)."
        )


def _train(experiment: Experiment, job: list[PlannedRun], progress: ArmsProgress) -> str | None:
    """Train a run and then its branches, in one process, unless all of them are trained."""
    run = job[0]
    unfinished = [part for part in job if not has_finished(part.recipe)]
    for part in job:
        if part not in unfinished:
            progress.end(part)
    if not unfinished:
        progress.say(f"{run.trial.name}: trained already")
        return None

    def tick() -> None:
        while unfinished:
            current = unfinished[0]
            progress.follow(current)
            if not has_finished(current.recipe):
                return
            record = read_run(current.trial, current.label)
            loss = numbers.fixed(record.final_validation("causal"), 4)
            problem = f"; {record.problem}" if record.problem else ""
            progress.say(f"{current.trial.name}: trained {current.plan.steps} steps, validation loss {loss}{problem}")
            progress.end(unfinished.pop(0))

    folder = RunFolder(run.trial.folder)
    recipe_file = experiment.folder / "recipes" / f"{folder.name}.yaml"
    write_text(recipe_file, run.recipe.to_yaml())
    # Not in the run folder, which the trainer expects to be empty or its own.
    log = experiment.folder / "logs" / f"{folder.name}-training.log"
    try:
        status = run_child(training_command(experiment.launch, recipe_file), log, tick)
    except Interrupted:
        step = folder.status().get("step", 0)
        progress.say(f"{run.trial.name}: stopped at step {step} of {run.plan.steps}")
        raise
    tick()
    if not unfinished:
        return None
    if RunFolder(unfinished[0].trial.folder).status().get("state") == "stopped":
        raise Interrupted
    return f"{run.trial.name}: training ended with status {status}; the end of {log}:\n{last_lines(log)}"


def _evaluate(experiment: Experiment, run: PlannedRun, progress: ArmsProgress) -> str | None:
    """Run `mor eval` for the suites whose stored results are not what it would compute now; returns the first failure,
    which does not stop the others.
    """
    folder, settings = RunFolder(run.trial.folder), experiment.evaluation
    chosen = {
        suite: Settings(settings.limit_of(suite), text_bytes=settings.text_bytes or TEXT_BYTES, hub=settings.hub)
        for suite in check_suites(settings.suites)
    }
    missing = [suite for suite in chosen if not is_current(folder, suite, chosen[suite])]
    if missing:
        progress.activity(run, f"evaluating: {', '.join(missing)}")
    failure = None
    for arguments in evaluation_arguments(settings, folder.path, missing):
        command = [sys.executable, "-m", "pretrain.cli.main", "eval", *arguments]
        log = experiment.folder / "logs" / f"{run.trial.name.replace('/', '-')}-evaluation.log"
        status = run_child(command, log)
        if status != 0 and failure is None:
            failure = f"{run.trial.name}: evaluation ended with status {status}; the end of {log}:\n{last_lines(log)}"
    return failure
