"""What the other scripts of slurm/ run: preparing text, evaluating runs, comparing arms. Standard library only."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from pretrain.cluster.job import Job, say
from pretrain.errors import LaunchError
from pretrain.signals import EXIT_FINISHED, EXIT_NO_PROGRESS, EXIT_USER

_MOR = ["-u", "-m", "pretrain.cli.main"]
_FINAL = (EXIT_FINISHED, EXIT_USER, EXIT_NO_PROGRESS, 1)


def prep(job: Job, arguments: list[str]) -> int:
    """`tokenize` with these arguments: as an array's element, as MPI ranks, or alone; `merge OUT` after an array."""
    if arguments[0] == "merge":
        return _alone(job, ["prep", *arguments])
    command = ["prep", "tokenize", *arguments]
    index, count = _place(job)
    if count > 1:
        if index == 0:
            _after(job, "afterok", "prep", ["merge", _value_of("--out", arguments)])
        return _alone(job, [*command, f"--task-index={index}", f"--task-count={count}", f"--workers={job.cores}"])
    if job.tasks > 1:
        ranks = job.inside([job.python, *_MOR, *command, "--mpi"])
        code = job.step(ranks, options=[f"--mpi={job.environ.get('MOR_MPI', 'pmix')}"])
        return job.start_again(code, "to continue") if job.announced and not job.is_ending() else code
    return _alone(job, [*command, f"--workers={job.cores}"])


def evaluate(job: Job, arguments: list[str]) -> int:
    """Every suite on every run, shared out over the array's elements; what is evaluated already is only read."""
    runs, suites, options = _split_evaluation(arguments)
    pairs = [(run, suite) for run in runs for suite in suites]
    index, count = _place(job)
    code = EXIT_FINISHED
    for run, suite in pairs[index::count]:
        say(f"{suite} on {run}")
        code = max(code, _alone(job, ["eval", run, f"--suite={suite}", *options]))
    return code


def compare(job: Job, arguments: list[str]) -> int:
    """The arms of an experiment, shared out over the array's elements, each on a node of its own; then the report."""
    experiment, *overrides = arguments
    arms = _arms(job, experiment, overrides)
    index, count = _place(job)
    if count > 1 and index == 0:
        _after(job, "afterany", "compare", ["report", experiment, *overrides])
    chosen = arms[index::count]
    if not chosen:
        say(f"no arm is left for element {index} of {count}: {experiment} has {len(arms)}.")
        return EXIT_FINISHED
    return _alone(job, ["compare", "run", experiment, *overrides, f"--arm={','.join(chosen)}"])


def prepare(job: Job, arguments: list[str]) -> int:
    """An experiment's text, and the recipe file of each of its runs, for the training jobs that wait for this one."""
    return _module(job, ["pretrain.cluster.arms", "prepare", *arguments])


def report(job: Job, arguments: list[str]) -> int:
    """An experiment's report, from whatever of its runs there is."""
    return _alone(job, ["compare", "report", *arguments])


def _alone(job: Job, arguments: list[str]) -> int:
    code = job.alone([job.python, *_MOR, *arguments])
    if (job.announced or code not in _FINAL) and code != EXIT_FINISHED and not job.is_ending():
        return job.start_again(code, "to continue")
    return code


def _module(job: Job, arguments: list[str]) -> int:
    code = job.alone([job.python, "-u", "-m", *arguments])
    return job.start_again(code, "to continue") if job.announced and code and not job.is_ending() else code


def _arms(job: Job, experiment: str, overrides: list[str]) -> list[str]:
    command = job.inside([job.python, "-m", "pretrain.cluster.arms", "list", experiment, *overrides])
    if job.container_options():
        command = ["srun", "--nodes=1", "--ntasks=1", *job.container_options(), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LaunchError("the experiment cannot be used; nothing was started.")
    return done.stdout.split()


def _place(job: Job) -> tuple[int, int]:
    """This element's place in its array, counted from 0, and the array's size; (0, 1) outside one."""
    if not job.array:
        return 0, 1
    first, step = int(job.environ["SLURM_ARRAY_TASK_MIN"]), int(job.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    return (int(job.environ["SLURM_ARRAY_TASK_ID"]) - first) // step, int(job.environ["SLURM_ARRAY_TASK_COUNT"])


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


def _split_evaluation(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Run folders, suites, and what else `mor eval` takes."""
    runs: list[str] = []
    suites: list[str] = []
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--suite", "-s"):
            suites.append(next(words, ""))
        elif word.startswith("--suite="):
            suites.append(word.partition("=")[2])
        elif word.startswith("-"):
            options.append(word)
        elif options and not Path(word).exists():
            options.append(word)  # the value of an option before it
        else:
            runs.append(word)
    if not runs:
        raise LaunchError("no run folder is named: sbatch slurm/eval.sbatch RUN... --suite perplexity")
    return runs, suites or ["perplexity", "own", "routing"], options
