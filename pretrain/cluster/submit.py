"""A recipe or an experiment as a chain of Slurm jobs: what is submitted, in which order, and what forbids it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.plain_text import plain
from pretrain.cluster.job_records import Record, remember
from pretrain.cluster.profiles import Profile
from pretrain.errors import LaunchError, RecipeError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.ranks.environment import LOOPBACK, Ranks, clean_environment
from pretrain.ranks.toolchain import prepare_toolchain
from pretrain.recipe.yaml_input import read_yaml
from pretrain.records.run_folder import require_writable

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe

_SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
# Announcements of the scripts' --signal lines; a job must be able to last longer.
_ANNOUNCED_SECONDS = {"train": 300, "compare": 300, "prep": 120, "eval": 60}
_ENOUGH_MEMORY = 1 << 60
_TIME = re.compile(r"(?:[0-9]{1,9}-)?[0-9]{1,9}(?::[0-9]{1,9}){0,2}")


@dataclass(frozen=True)
class Step:
    """One job of a chain. `after` names steps it waits for and the condition (`afterok`, `afterany`)."""

    name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    log: str
    run: str | None = None
    after: tuple[tuple[str, str], ...] = ()

    def command(self, numbers: dict[str, str]) -> list[str]:
        """The sbatch command once the numbers of earlier jobs are known (their names stand in for them before)."""
        words = ["sbatch", "--parsable", f"--job-name={self.name}", f"--output={self.log}", *self.options]
        if self.after:
            conditions = ",".join(f"{condition}:{numbers.get(name, name)}" for condition, name in self.after)
            words += [f"--dependency={conditions}", "--kill-on-invalid-dep=yes"]
        return [*words, str(_SCRIPTS / f"{self.script}.sbatch"), *self.arguments]


def is_experiment(path: str) -> bool:
    """Whether a YAML file is an experiment (it has arms) and not a recipe.

    Raises:
        RecipeError: when it cannot be read.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe or experiment; recipes/ holds examples to copy.") from None
    return isinstance(values, dict) and "arms" in values


def plan_recipe(path: str, overrides: list[str], profile: Profile, suites: list[str] | None) -> list[Step]:
    """Train, then evaluate.

    Raises:
        RecipeError, DataError: when the recipe cannot run on so many ranks, or its shards are missing or damaged.
        UserError: for a suite that does not exist, or that reads text which the data set does not have.
    """
    from pretrain.recipe.recipe import load_recipe

    prepare_toolchain()
    recipe = load_recipe(path, overrides)
    _check_recipe(recipe, profile.ranks)
    _check_held_out(recipe, suites or HELD_OUT_SUITES)
    logs = f"{recipe.run_folder}.logs"
    train = _training_step(recipe.name, path, overrides, recipe.run_folder, f"{logs}/train-%j.out", profile)
    arguments = [recipe.run_folder, *(f"--suite={suite}" for suite in suites or HELD_OUT_SUITES)]
    return [train, _evaluation_step(f"{recipe.name}-eval", arguments, train.name, logs, profile)]


def plan_experiment(
    path: str, overrides: list[str], profile: Profile, suites: list[str] | None, limit: int
) -> list[Step]:
    """Prepare text and recipes, train every run (at most `limit` at once, 0 for no limit), evaluate, and report.

    Raises:
        RecipeError: when one of its runs cannot run on so many ranks.
    """
    from pretrain.cluster.arms import recipe_file
    from pretrain.comparison.experiment import load_experiment
    from pretrain.comparison.launch import evaluation_arguments
    from pretrain.comparison.planned_runs import jobs
    from pretrain.comparison.planned_runs import plan_experiment as plan
    from pretrain.evaluation.suites import check_suites

    prepare_toolchain()
    experiment = load_experiment(path, overrides)
    # A run trains the smaller budgets that branch off it too, in its own job.
    runs = jobs(plan(experiment))
    for run, *_ in runs:
        _check_recipe(run.recipe, profile.ranks, data=False)
    logs = f"{experiment.folder}/logs"
    name = experiment.name
    whole_node = slurm_options(dataclasses.replace(Shape.of(profile), nodes=1), profile, tasks=False)
    steps = [Step(f"{name}-prepare", "compare", ("prepare", path, *overrides), whole_node, f"{logs}/prepare-%j.out")]
    wanted = check_suites(suites or experiment.evaluation.suites)
    for place, (run, *branches) in enumerate(runs):
        folder = str(run.trial.folder)
        label = f"{name}-{run.trial.folder.name}"
        step = _training_step(
            label, str(recipe_file(experiment, run.trial.folder.name)), [], folder, f"{logs}/{label}-%j.out", profile
        )
        after = [("afterok", f"{name}-prepare")]
        if limit and place >= limit:
            after.append(("afterany", f"{name}-{runs[place - limit][0].trial.folder.name}"))
        steps.append(dataclasses.replace(step, after=tuple(after)))
        for member in (run, *branches):
            where = f"{name}-{member.trial.name.replace('/', '-')}-eval"
            commands = evaluation_arguments(experiment.evaluation, member.trial.folder, wanted)
            for number, arguments in enumerate(commands):
                title = f"{where}-{number + 1}" if len(commands) > 1 else where
                steps.append(_evaluation_step(title, arguments, step.name, logs, profile))
    ends = tuple(("afterany", step.name) for step in steps if step.script == "eval")
    small = slurm_options(Shape(1, 0, 1), profile)
    report = Step(f"{name}-report", "compare", ("report", path, *overrides), small, f"{logs}/report-%j.out", after=ends)
    return [*steps, report]


def submit(steps: list[Step], profile: Profile, *, dry_run: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Check every step with `sbatch --test-only`, then submit the chain; returns the job number of each step.

    Raises:
        LaunchError: without Slurm, or when Slurm would refuse a step; nothing has been submitted then.
        RunError: the folder of the logs cannot be written; the same.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("there is no sbatch here; log in to a cluster's login node, or use mor submit --local.")
    if not (_SCRIPTS / "train.sbatch").is_file():
        raise LaunchError(f"{_SCRIPTS} is missing; submit from a checkout of the project (pip install -e .).")
    environ = job_environment(profile)
    for step in steps:
        alone = dataclasses.replace(step, after=())
        test = ["sbatch", "--test-only", *alone.command({})[2:]]
        done = _sbatch(test, environ)
        if done.returncode:
            reason = ((done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"])[-1]
            raise LaunchError(f"{step.name}: Slurm would refuse this job: {plain(reason)}\n  {shlex.join(test)}")
    # Slurm does not make the folders of its logs.
    for folder in () if dry_run else {Path(step.log).parent for step in steps}:
        require_writable(folder)
    numbers: dict[str, str] = {}
    for step in steps:
        if not dry_run:
            done = _sbatch(step.command(numbers), environ)
            number = done.stdout.strip().split(";")[0]
            if done.returncode or not number:
                _take_back(numbers, environ)
                said = plain(done.stderr.strip())
                raise LaunchError(f"{step.name}: sbatch: {said}; the jobs before it were cancelled.")
            numbers[step.name] = number
            try:
                remember(_record(step, numbers))
            except OSError as error:
                say(f"{step.name}: is submitted, but mor jobs will not know it: {error}")
        say(f"{numbers.get(step.name, 'would submit'):>12}  {shlex.join(step.command(numbers))}")
    return numbers


def _sbatch(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ, capture_output=True, text=True, errors="replace")


def run_locally(steps: list[Step], profile: Profile, say: Callable[[str], None]) -> int:
    """The same chain on this machine, one step after another; returns the exit code of the first that fails."""
    for step in steps:
        command = _local_command(step, profile)
        say(shlex.join(command))
        code = subprocess.call(command, env={**clean_environment(), **profile.environment})
        if code and not any(
            condition == "afterany" and name == step.name for s in steps for condition, name in s.after
        ):
            say(f"{step.name} ended with code {code}; the same command continues.")
            return code
    return 0


@dataclass(frozen=True)
class Shape:
    """Nodes of a job, and GPUs and tasks of each."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int

    @classmethod
    def of(cls, profile: Profile) -> Shape:
        return cls(profile.nodes, profile.gpus_per_node or 0, profile.tasks_per_node or profile.gpus_per_node or 1)


def _check_recipe(recipe: Recipe, ranks: int, *, data: bool = True) -> None:
    """Everything about a recipe that can be known without its nodes."""
    from pretrain.recipe.plan import make_plan
    from pretrain.records.finished import begun_with
    from pretrain.training.open_data import open_data
    from pretrain.training.zero_stage import choose_stage

    begun_with(recipe)
    known = recipe if recipe.precision != "auto" else recipe.model_copy(update={"precision": "bf16"})
    plan = make_plan(known)
    # How much memory the nodes' devices have is not known here: enough for the first stage that is possible at all.
    place = Ranks(0, ranks, 0, 1, 0, LOOPBACK, 1, "mor submit")
    choose_stage(known, place, memory=_ENOUGH_MEMORY, on_cpu=False)
    if data:
        open_data(known, plan)


def _check_held_out(recipe: Recipe, suites: Sequence[str]) -> None:
    """Find out now, and not after days of training, that there is nothing to evaluate on."""
    from pretrain.evaluation.held_out import TEST_FILE
    from pretrain.evaluation.suites import check_suites

    reading = [suite for suite in check_suites(suites) if suite in HELD_OUT_SUITES]
    folders = [recipe.data.path] if recipe.data.path else [source.path for source in recipe.data.sources]
    for folder in folders:
        if reading and not (Path(folder) / TEST_FILE).is_file():
            raise RecipeError(
                f"{Path(folder) / TEST_FILE}: missing, and {', '.join(reading)} are evaluated on it after training; "
                "prepare the data set with a test split, or name other suites with --suite."
            )


def _training_step(name: str, recipe: str, overrides: list[str], run: str, log: str, profile: Profile) -> Step:
    options = list(slurm_options(Shape.of(profile), profile))
    if not profile.requeue:
        options += ["--no-requeue", f"--array=1-{profile.chain}%1"]
    return Step(name, "train", (recipe, *overrides), tuple(options), log, run=run)


def _evaluation_step(name: str, arguments: Sequence[str], after: str, logs: str, profile: Profile) -> Step:
    """`arguments` are those of `mor eval`, the run folder first."""
    options = slurm_options(Shape(1, min(1, profile.gpus_per_node or 0), 1), profile)
    # A chain's elements after the last one that trained are cancelled, which counts as neither success nor failure.
    condition = "afterok" if profile.requeue else "afterany"
    log, run = f"{logs}/eval-%j.out", arguments[0]
    return Step(name, "eval", tuple(arguments), options, log, run=run, after=((condition, after),))


def slurm_options(shape: Shape, profile: Profile, *, tasks: bool = True) -> tuple[str, ...]:
    """Options of sbatch and srun for a job of this shape on this cluster."""
    options = [f"--nodes={shape.nodes}"]
    options += [f"--ntasks-per-node={shape.tasks_per_node}"] if tasks else []
    options += [f"--gpus-per-node={shape.gpus_per_node}"] if shape.gpus_per_node else []
    for name in ("partition", "account", "qos", "constraint", "time"):
        if value := getattr(profile, name):
            options.append(f"--{name}={value}")
    return (*options, *profile.options)


def job_environment(profile: Profile) -> dict[str, str]:
    """Variables of `sbatch`, which Slurm hands to the jobs."""
    environ = {**clean_environment(), **profile.environment}
    # The accelerator that this machine lacks is there on the nodes.
    environ = {
        name: value
        for name, value in environ.items()
        if not name.startswith("SBATCH_") and (name != "DS_ACCELERATOR" or name in profile.environment)
    }
    activate = Path(sys.prefix) / "bin" / "activate"
    setup = profile.setup or (f". {shlex.quote(str(activate))}" if activate.is_file() else "true")
    environ |= {"MOR_SETUP": setup, "MOR_LAUNCHER": profile.launcher, "MOR_HEALTH": profile.health}
    if profile.container:
        environ["MOR_CONTAINER"] = profile.container
    return environ


def _record(step: Step, numbers: dict[str, str]) -> Record:
    number = numbers[step.name]
    trained = step.arguments if step.script == "train" else ()
    return Record(
        job=number,
        name=step.name,
        kind=step.script,
        run=str(Path(step.run).resolve()) if step.run else None,
        log=str(Path(step.log.replace("%j", number)).resolve()),
        time=time.time(),
        recipe=str(Path(trained[0]).resolve()) if trained else None,
        overrides=list(trained[1:]),
    )


def _take_back(numbers: dict[str, str], environ: dict[str, str]) -> None:
    if numbers:
        subprocess.run(["scancel", *numbers.values()], env=environ, capture_output=True)


def _local_command(step: Step, profile: Profile) -> list[str]:
    mor = [sys.executable, "-m", "pretrain.cli.main"]
    if step.script == "eval":
        return [*mor, "eval", *step.arguments]
    if step.script == "compare":
        kind, *rest = step.arguments
        return [*mor, "compare", "report", *rest] if kind == "report" else _module("pretrain.cluster.arms", kind, *rest)
    ranks = profile.tasks_per_node or profile.gpus_per_node or 1
    script = str(_SCRIPTS.parent / "pretrain" / "train.py")
    if ranks == 1:
        return [sys.executable, script, "--config", *step.arguments]
    launcher = _module("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return [*launcher, script, "--config", *step.arguments]


def _module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def check_time(profile: Profile) -> None:
    """Refuse a time limit that a job's own announcement of its end would use up.

    Raises:
        LaunchError: naming the shortest that makes sense.
    """
    if not profile.time:
        return
    seconds = time_limit_seconds(profile.time)
    longest = max(_ANNOUNCED_SECONDS.values())
    if seconds is not None and seconds < 2 * longest:
        raise LaunchError(
            f"--time {profile.time}: jobs write a checkpoint {longest} s before the end; give at least 10 minutes."
        )


def time_limit_seconds(text: str) -> float | None:
    """Seconds of a Slurm time limit (`minutes`, `m:s`, `h:m:s`, `d-h`, `d-h:m`, `d-h:m:s`); None for no limit.

    Raises:
        LaunchError: when it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not _TIME.fullmatch(text):
        raise LaunchError(f"--time {plain(text)}: not a time limit; write 24:00:00, 2-12:00:00 or minutes.")
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return 86400.0 * int(days) + 3600 * hours + 60 * minutes + seconds
    hours, minutes, seconds = {1: [0, numbers[0], 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return 3600.0 * hours + 60 * minutes + seconds
