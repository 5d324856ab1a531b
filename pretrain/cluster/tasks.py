"""What the other scripts of slurm/ run: preparing text, evaluating runs, comparing arms. Standard library only."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.cluster.restarts import note_start, written
from pretrain.cluster.slurm_job import PROJECT, Job, environment_for_jobs, say
from pretrain.errors import LaunchError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_NO_PROGRESS, EXIT_USER

# What a job does (returns its exit code), and the folders in which its progress shows.
Task = tuple[Callable[[], int], list[Path]]
_MOR = ["-u", "-m", "pretrain.cli.main"]
_FINAL = (EXIT_FINISHED, EXIT_USER, EXIT_NO_PROGRESS, 1)
_OLD_SECONDS = 30 * 86400


def run_task(job: Job, kind: str, arguments: list[str]) -> int:
    """Do one of `TASKS`, unless it has been started several times without progress; returns the exit code."""
    work, folders = TASKS[kind](job, arguments)
    for file in Path.cwd().glob(f".{kind}-*.restarts.json"):  # those of cancelled jobs stay
        with contextlib.suppress(OSError):  # another job has removed it meanwhile
            if file.stat().st_mtime < time.time() - _OLD_SECONDS:
                file.unlink()
    history = Path.cwd() / f".{kind}-{job.identity}.restarts.json"
    if problem := note_start(history, shlex.join([kind, *arguments]), written(folders), job.identity, say):
        say(problem)
        code = EXIT_NO_PROGRESS
    else:
        code = work()
    # While a job ends, Slurm does not say whether it was cancelled or will start again; its history stays until then.
    if code == EXIT_FINISHED or (code != EXIT_AGAIN and not job.is_ending()):
        history.unlink(missing_ok=True)
    return code


def prep(job: Job, arguments: list[str]) -> Task:
    """`tokenize` with these arguments: as an array's element, as MPI ranks, or alone; `merge OUT` after an array."""
    if arguments[0] == "merge":
        return lambda: _mor(job, "prep", *arguments), []
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    out = parser.parse_known_args(arguments)[0].out
    if out is None:
        raise LaunchError("--out is missing: sbatch slurm/prep.sbatch SOURCE... --out DATA --tokenizer FILE")
    command = ["prep", "tokenize", *arguments]

    def tokenize() -> int:
        index, count = _place(job)
        if count > 1:
            if index == 0:
                _submit_after(job, "afterok", "prep", ["merge", out])
            return _mor(job, *command, f"--task-index={index}", f"--task-count={count}", f"--workers={job.cores}")
        if job.tasks > 1:
            ranks = job.inside([job.python, *_MOR, *command, "--mpi"])
            return _restarted(job, job.step(ranks, options=[f"--mpi={job.environ.get('MOR_MPI', 'pmix')}"]))
        return _mor(job, *command, f"--workers={job.cores}")

    return tokenize, [Path(out)]


def evaluate(job: Job, arguments: list[str]) -> Task:
    """Every suite on every run, shared out over the array's elements; `mor eval` reads results that exist already."""
    runs, suites, options = evaluation_arguments(arguments)

    def work() -> int:
        index, count = _place(job)
        code = EXIT_FINISHED
        for run, suite in itertools.islice(itertools.product(runs, suites), index, None, count):
            say(f"{suite} on {run}")
            code = max(code, _mor(job, "eval", run, f"--suite={suite}", *options))
            if job.announced or code == EXIT_AGAIN:
                break
        return code

    return work, [Path(run) for run in runs]


def evaluation_arguments(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Run folders, suites, and the other options of `mor eval`.

    Raises:
        LaunchError: the runs do not come first, or --markdown is given, whose file each evaluation would overwrite.
    """
    parser = argparse.ArgumentParser(prog="eval.sbatch", add_help=False, allow_abbrev=False)
    parser.add_argument("-s", "--suite", action="append")
    given, others = parser.parse_known_args(arguments)
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), others))
    options = others[len(runs) :]
    if not runs or any(option.startswith("--markdown") for option in options):
        raise LaunchError("eval: sbatch slurm/eval.sbatch RUN... [OPTIONS of mor eval, except --markdown]")
    return runs, given.suite or [*HELD_OUT_SUITES], options


def compare(job: Job, arguments: list[str]) -> Task:
    """The arms of an experiment, shared out over the array's elements, each on a node of its own; then the report."""
    experiment = job.ask("pretrain.cluster.arms", ["list", *arguments], "arms", "folder", "data")
    arms = experiment["arms"]

    def work() -> int:
        index, count = _place(job)
        if count > 1 and index == 0:
            _submit_after(job, "afterany", "compare", ["report", *arguments])
        if chosen := arms[index::count]:
            return _mor(job, "compare", "run", *arguments, f"--arm={','.join(chosen)}")
        say(f"no arm is left for element {index} of {count}: {arguments[0]} has {len(arms)}.")
        return EXIT_FINISHED

    return work, [Path(experiment["folder"]), Path(experiment["data"])]


def prepare(job: Job, arguments: list[str]) -> Task:
    """An experiment's text, and the recipe file of each of its runs, for the training jobs that wait for this one."""
    experiment = job.ask("pretrain.cluster.arms", ["list", *arguments], "data")
    command = [job.python, "-u", "-m", "pretrain.cluster.arms", "prepare", *arguments]
    return lambda: _restarted(job, job.alone(command)), [Path(experiment["data"])]


TASKS: dict[str, Callable[[Job, list[str]], Task]] = {
    "prep": prep,
    "eval": evaluate,
    "compare": compare,
    "prepare": prepare,
    "report": lambda job, arguments: (lambda: _mor(job, "compare", "report", *arguments), []),
}


def _mor(job: Job, *arguments: str) -> int:
    return _restarted(job, job.alone([job.python, *_MOR, *arguments]))


def _restarted(job: Job, code: int) -> int:
    """Start the job again if its command was interrupted or killed; returns the exit code."""
    if code != EXIT_FINISHED and (job.announced or code not in _FINAL) and not job.is_ending():
        return job.start_again(job.why(code), code)
    return code


def _place(job: Job) -> tuple[int, int]:
    """This element's place in its array, counted from 0, and the array's size; (0, 1) outside an array."""
    if not job.array:
        return 0, 1
    index, first, count = (job.number(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT"))
    return (index - first) // job.number("SLURM_ARRAY_TASK_STEP", "1"), count


def _submit_after(job: Job, condition: str, script: str, arguments: list[str]) -> None:
    """Submit the job that completes the work of this array; once, at its first start."""
    if job.restarts:
        return
    file = str(PROJECT / "slurm" / f"{script}.sbatch")
    options = ["--parsable", f"--dependency={condition}:{job.array}", "--kill-on-invalid-dep=yes"]
    command = ["sbatch", *options, f"--job-name=mor-{arguments[0]}", file, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_for_jobs())
    if done.returncode:
        by_hand = shlex.join(["sbatch", file, *arguments])
        say(f"could not submit `{arguments[0]}` ({done.stderr.strip()}); when the array is done: {by_hand}")
    else:
        say(f"job {done.stdout.strip()} does `{' '.join(arguments)}` after array {job.array}.")
