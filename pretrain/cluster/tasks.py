"""What the other scripts of slurm/ run: preparing text, evaluating runs, comparing arms. Standard library only."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from data_prep.plain_text import plain
from pretrain.cluster.restarts import note_start, written
from pretrain.cluster.slurm_job import Job, said, say
from pretrain.errors import LaunchError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_NO_PROGRESS, EXIT_USER

_MOR = ["-u", "-m", "pretrain.cli.main"]
# Options of `mor eval` with and without a value. Its table would be written by every suite of every run anew.
_VALUES = ("limit", "routing", "depth", "text-bytes", "data", "device")
_SWITCHES = ("hub",)
_FINAL = (EXIT_FINISHED, EXIT_USER, EXIT_NO_PROGRESS, 1)


@dataclass(frozen=True)
class Task:
    """What a job does: `work` returns its exit code, `folders` are those in which its progress shows."""

    work: Callable[[], int]
    folders: list[Path] = field(default_factory=list)


def run_task(job: Job, kind: str, arguments: list[str]) -> int:
    """Do one of `TASKS`, unless it has been started several times without getting anywhere; returns the exit code."""
    task = TASKS[kind](job, arguments)
    file = Path.cwd() / f".{kind}-{job.identity}.restarts.json"
    cause = "first start" if job.restarts == 0 else f"restart {job.restarts}"
    what = shlex.join([kind, *arguments])
    if problem := note_start(file, what, written(task.folders), job.identity, cause, say):
        say(problem)
        code = EXIT_NO_PROGRESS
    else:
        code = task.work()
    # A job that Slurm starts again does not come here, or comes here while it is being ended.
    if code == EXIT_FINISHED or (code != EXIT_AGAIN and not job.is_ending()):
        file.unlink(missing_ok=True)
    return code


def prep(job: Job, arguments: list[str]) -> Task:
    """`tokenize` with these arguments: as an array's element, as MPI ranks, or alone; `merge OUT` after an array."""
    if arguments[0] == "merge":
        return Task(lambda: _alone(job, ["prep", *arguments]))
    return Task(lambda: _tokenize(job, arguments), [Path(_value_of("--out", arguments))])


def _tokenize(job: Job, arguments: list[str]) -> int:
    command = ["prep", "tokenize", *arguments]
    index, count = _place(job)
    if count > 1:
        if index == 0:
            _after(job, "afterok", "prep", ["merge", _value_of("--out", arguments)])
        return _alone(job, [*command, f"--task-index={index}", f"--task-count={count}", f"--workers={job.cores}"])
    if job.tasks > 1:
        ranks = job.inside([job.python, *_MOR, *command, "--mpi"])
        code = job.step(ranks, options=[f"--mpi={job.environ.get('MOR_MPI', 'pmix')}"])
        return job.start_again(code, "to continue") if job.announced and code and not job.is_ending() else code
    return _alone(job, [*command, f"--workers={job.cores}"])


def evaluate(job: Job, arguments: list[str]) -> Task:
    """Every suite on every run, shared out over the array's elements; what is evaluated already is only read."""
    runs, suites, options = evaluation_arguments(arguments)
    return Task(lambda: _evaluate(job, runs, suites, options), [Path(run) for run in runs])


def _evaluate(job: Job, runs: list[str], suites: list[str], options: list[str]) -> int:
    pairs = [(run, suite) for run in runs for suite in suites]
    index, count = _place(job)
    code = EXIT_FINISHED
    for run, suite in pairs[index::count]:
        say(f"{suite} on {run}")
        code = max(code, _alone(job, ["eval", run, f"--suite={suite}", *options]))
        if job.announced or code == EXIT_AGAIN:
            break
    return code


def compare(job: Job, arguments: list[str]) -> Task:
    """The arms of an experiment, shared out over the array's elements, each on a node of its own; then the report."""
    experiment = _experiment(job, arguments)
    folders = [Path(experiment["folder"]), Path(experiment["data"])]
    return Task(lambda: _compare(job, experiment["arms"], arguments), folders)


def _compare(job: Job, arms: list[str], arguments: list[str]) -> int:
    experiment, *overrides = arguments
    index, count = _place(job)
    if count > 1 and index == 0:
        _after(job, "afterany", "compare", ["report", experiment, *overrides])
    chosen = arms[index::count]
    if not chosen:
        say(f"no arm is left for element {index} of {count}: {experiment} has {len(arms)}.")
        return EXIT_FINISHED
    return _alone(job, ["compare", "run", experiment, *overrides, f"--arm={','.join(chosen)}"])


def prepare(job: Job, arguments: list[str]) -> Task:
    """An experiment's text, and the recipe file of each of its runs, for the training jobs that wait for this one."""
    work = ["pretrain.cluster.arms", "prepare", *arguments]
    return Task(lambda: _module(job, work), [Path(_experiment(job, arguments)["data"])])


def report(job: Job, arguments: list[str]) -> Task:
    """An experiment's report, from whatever of its runs there is."""
    return Task(lambda: _alone(job, ["compare", "report", *arguments]))


TASKS: dict[str, Callable[[Job, list[str]], Task]] = {
    "prep": prep,
    "eval": evaluate,
    "compare": compare,
    "prepare": prepare,
    "report": report,
}


def _alone(job: Job, arguments: list[str]) -> int:
    code = job.alone([job.python, *_MOR, *arguments])
    if (job.announced or code not in _FINAL) and code != EXIT_FINISHED and not job.is_ending():
        return job.start_again(code, "to continue")
    return code


def _module(job: Job, arguments: list[str]) -> int:
    code = job.alone([job.python, "-u", "-m", *arguments])
    return job.start_again(code, "to continue") if job.announced and code and not job.is_ending() else code


def _experiment(job: Job, arguments: list[str]) -> dict[str, Any]:
    """`arms`, `folder` and `data` of an experiment, read where its packages are installed."""
    command = job.inside([job.python, "-m", "pretrain.cluster.arms", "list", *arguments])
    if job.container_options():
        command = ["srun", "--nodes=1", "--ntasks=1", *job.container_options(), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LaunchError("the experiment cannot be used; nothing was started.")
    return said(done.stdout, command, "arms", "folder", "data")


def _place(job: Job) -> tuple[int, int]:
    """This element's place in its array, counted from 0, and the array's size; (0, 1) outside one."""
    if not job.array:
        return 0, 1
    index, first, count = (job.number(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT"))
    return (index - first) // job.number("SLURM_ARRAY_TASK_STEP", "1"), count


def _after(job: Job, condition: str, script: str, arguments: list[str]) -> None:
    """Submit the job that finishes what this array begins, once."""
    if job.restarts:
        return
    file = Path(__file__).resolve().parents[2] / "slurm" / f"{script}.sbatch"
    name = f"--job-name=mor-{arguments[0]}"
    options = ["--parsable", f"--dependency={condition}:{job.array}", "--kill-on-invalid-dep=yes", name]
    done = subprocess.run(
        ["sbatch", *options, str(file), *arguments],
        capture_output=True,
        text=True,
        env=job.environment_for_sbatch(),
    )
    if done.returncode:
        by_hand = shlex.join(["sbatch", str(file), *arguments])
        say(f"could not submit `{arguments[0]}` ({done.stderr.strip()}); when the array is done: {by_hand}")
    else:
        say(f"job {done.stdout.strip()} does `{' '.join(arguments)}` after array {job.array}.")


def _value_of(option: str, arguments: list[str]) -> str:
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and number + 1 < len(arguments):
            return arguments[number + 1]
    raise LaunchError(f"{option} is missing: sbatch slurm/prep.sbatch SOURCE... --out DATA --tokenizer FILE")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"eval: {plain(message)}; call it as sbatch slurm/eval.sbatch RUN... --suite perplexity")


def evaluation_arguments(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Run folders, suites, and what else of the options of `mor eval` is given.

    Raises:
        LaunchError: `mor eval` has no such option, or no run is named.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("-s", "--suite", action="append", default=[])
    others = [parser.add_argument(f"--{name}").dest for name in _VALUES]
    others += [parser.add_argument(f"--{name}", action="store_true").dest for name in _SWITCHES]
    given = parser.parse_intermixed_args(arguments)
    options = [
        f"--{name.replace('_', '-')}" + (f"={value}" if value is not True else "")
        for name in others
        if (value := getattr(given, name)) not in (None, False)
    ]
    return given.runs, given.suite or [*HELD_OUT_SUITES], options
