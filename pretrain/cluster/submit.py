"""A recipe or an experiment as a chain of Slurm jobs: what is submitted, in which order, and what forbids it."""

from __future__ import annotations

import dataclasses
import functools
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
from pretrain.cluster.clusters import Cluster
from pretrain.cluster.job_records import Record, remember
from pretrain.cluster.slurm_job import PROJECT, environment_for_jobs
from pretrain.errors import LaunchError, RecipeError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.ranks.environment import LOOPBACK, Ranks, clean_environment
from pretrain.ranks.toolchain import prepare_toolchain
from pretrain.recipe.yaml_input import read_yaml
from pretrain.records.run_folder import require_writable

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe

_SCRIPTS = PROJECT / "slurm"


@dataclass(frozen=True)
class Step:
    """One job of a chain.

    Attributes:
        script: of slurm/, without its ending; arguments: the script's; options: sbatch's.
        run: run folder that it trains or evaluates.
        after: steps that it waits for, each with its condition (`afterok`, `afterany`) first.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    log: str
    run: str | None = None
    after: tuple[tuple[str, str], ...] = ()

    def command(self, numbers: dict[str, str]) -> list[str]:
        """The sbatch command. `numbers` are those of earlier jobs; an unknown number is replaced by its step's name."""
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


def plan_recipe(path: str, overrides: list[str], cluster: Cluster, suites: list[str] | None) -> list[Step]:
    """Train, then evaluate.

    Raises:
        RecipeError, DataError: when the recipe cannot run on these ranks, or its shards are missing or damaged.
        UserError: for a suite that does not exist, or that reads text which the data set does not have.
    """
    from pretrain.recipe.recipe import load_recipe

    prepare_toolchain()
    recipe = load_recipe(path, overrides)
    wanted = suites or HELD_OUT_SUITES
    _check_recipe(recipe, cluster.ranks)
    _check_held_out(recipe, wanted)
    run, logs = recipe.run_folder, f"{recipe.run_folder}.logs"
    train = _training_step(recipe.name, path, overrides, run, f"{logs}/train-%j.out", cluster)
    arguments = [run, *(f"--suite={suite}" for suite in wanted)]
    return [train, _evaluation_step(f"{recipe.name}-eval", arguments, train.name, logs, cluster)]


def plan_experiment(
    path: str, overrides: list[str], cluster: Cluster, suites: list[str] | None, limit: int
) -> list[Step]:
    """Prepare text and recipes, train every run (at most `limit` at once, 0 for no limit), evaluate, and report.

    Raises:
        RecipeError: when one of its runs cannot run on this number of ranks.
    """
    from pretrain.cluster.arms import recipe_file
    from pretrain.comparison.experiment import load_experiment
    from pretrain.comparison.launch import evaluation_arguments
    from pretrain.comparison.planned_runs import jobs
    from pretrain.comparison.planned_runs import plan_experiment as plan
    from pretrain.evaluation.suites import check_suites

    prepare_toolchain()
    experiment = load_experiment(path, overrides)
    # A run also trains the smaller budgets that branch off it, in its own job.
    runs = jobs(plan(experiment))
    for run, *_ in runs:
        _check_recipe(run.recipe, cluster.ranks, data=False)
    name, logs = experiment.name, f"{experiment.folder}/logs"
    wanted = check_suites(suites or experiment.evaluation.suites)
    whole_node = slurm_options(cluster, nodes=1, gpus=cluster.gpus_per_node, tasks=None)
    steps = [Step(f"{name}-prepare", "compare", ("prepare", path, *overrides), whole_node, f"{logs}/prepare-%j.out")]
    for place, (run, *branches) in enumerate(runs):
        label = f"{name}-{run.trial.folder.name}"
        recipe = str(recipe_file(experiment, run.trial.folder.name))
        step = _training_step(label, recipe, [], str(run.trial.folder), f"{logs}/{label}-%j.out", cluster)
        after = [("afterok", f"{name}-prepare")]
        if limit and place >= limit:
            after.append(("afterany", f"{name}-{runs[place - limit][0].trial.folder.name}"))
        steps.append(dataclasses.replace(step, after=tuple(after)))
        for member in (run, *branches):
            where = f"{name}-{member.trial.name.replace('/', '-')}-eval"
            commands = evaluation_arguments(experiment.evaluation, member.trial.folder, wanted)
            for number, arguments in enumerate(commands):
                title = f"{where}-{number + 1}" if len(commands) > 1 else where
                steps.append(_evaluation_step(title, arguments, step.name, logs, cluster))
    ends = tuple(("afterany", step.name) for step in steps if step.script == "eval")
    small = slurm_options(cluster, nodes=1, gpus=0, tasks=1)
    report = Step(f"{name}-report", "compare", ("report", path, *overrides), small, f"{logs}/report-%j.out", after=ends)
    return [*steps, report]


def submit(steps: list[Step], cluster: Cluster, *, dry_run: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Check every step with `sbatch --test-only`, then submit the chain; returns the job number of each step.

    Raises:
        LaunchError: there is no Slurm, or Slurm would refuse a step. Nothing has been submitted then.
        RunError: the folder of the logs cannot be written. Nothing has been submitted then.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("there is no sbatch here; log in to a cluster's login node, or use mor submit --local.")
    if not (_SCRIPTS / "train.sbatch").is_file():
        raise LaunchError(f"{_SCRIPTS} is missing; submit from a checkout of the project (pip install -e .).")
    run = functools.partial(
        subprocess.run, env=job_environment(cluster), capture_output=True, text=True, errors="replace"
    )
    for step in steps:
        test = ["sbatch", "--test-only", *dataclasses.replace(step, after=()).command({})[2:]]
        done = run(test)
        if done.returncode:
            reason = ((done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"])[-1]
            raise LaunchError(f"{step.name}: Slurm would refuse this job: {plain(reason)}\n  {shlex.join(test)}")
    # Slurm does not make the folders of its logs.
    for folder in () if dry_run else {Path(step.log).parent for step in steps}:
        require_writable(folder)
    numbers: dict[str, str] = {}
    for step in steps:
        if not dry_run:
            done = run(step.command(numbers))
            number = done.stdout.strip().split(";")[0]
            if done.returncode or not number:
                if numbers:
                    run(["scancel", *numbers.values()])
                said = plain(done.stderr.strip())
                raise LaunchError(f"{step.name}: sbatch: {said}; the jobs before it were cancelled.")
            numbers[step.name] = number
            try:
                remember(_record(step, number))
            except OSError as error:
                say(f"{step.name}: is submitted, but mor jobs will not know it: {error}")
        say(f"{numbers.get(step.name, 'would submit'):>12}  {shlex.join(step.command(numbers))}")
    return numbers


def run_locally(steps: list[Step], cluster: Cluster, say: Callable[[str], None]) -> int:
    """The same chain on this machine, one step after another; returns the exit code of the first that fails."""
    may_fail = {name for step in steps for condition, name in step.after if condition == "afterany"}
    for step in steps:
        command = _local_command(step, cluster)
        say(shlex.join(command))
        code = subprocess.call(command, env={**clean_environment(), **cluster.environment})
        if code and step.name not in may_fail:
            say(f"{step.name} ended with code {code}; the same command continues.")
            return code
    return 0


def _local_command(step: Step, cluster: Cluster) -> list[str]:
    module = [sys.executable, "-m"]
    if step.script == "compare" and step.arguments[0] == "prepare":
        return [*module, "pretrain.cluster.arms", *step.arguments]
    if step.script != "train" or cluster.ranks_per_node == 1:
        return [*module, "pretrain.cli.main", step.script, *step.arguments]
    launcher = [*module, "torch.distributed.run", "--standalone", f"--nproc-per-node={cluster.ranks_per_node}"]
    return [*launcher, str(PROJECT / "pretrain" / "train.py"), "--config", *step.arguments]


def _check_recipe(recipe: Recipe, ranks: int, *, data: bool = True) -> None:
    """Check what can be checked about a recipe without its nodes."""
    from pretrain.recipe.plan import make_plan
    from pretrain.records.finished import begun_with
    from pretrain.training.open_data import open_data
    from pretrain.training.zero_stage import choose_stage

    begun_with(recipe)
    known = recipe if recipe.precision != "auto" else recipe.model_copy(update={"precision": "bf16"})
    plan = make_plan(known)
    # The memory of the nodes' devices is not known here; assume that the first possible stage fits.
    place = Ranks(0, ranks, 0, 1, 0, LOOPBACK, 1, "mor submit")
    choose_stage(known, place, memory=1 << 60, on_cpu=False)
    if data:
        open_data(known, plan)


def _check_held_out(recipe: Recipe, suites: Sequence[str]) -> None:
    """Fail now, and not after days of training, if there is nothing to evaluate on."""
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


def _training_step(name: str, recipe: str, overrides: list[str], run: str, log: str, cluster: Cluster) -> Step:
    options = slurm_options(cluster, nodes=cluster.nodes, gpus=cluster.gpus_per_node, tasks=cluster.ranks_per_node)
    if not cluster.requeue:
        options += ("--no-requeue", f"--array=1-{cluster.chain}%1")
    return Step(name, "train", (recipe, *overrides), options, log, run=run)


def _evaluation_step(name: str, arguments: Sequence[str], after: str, logs: str, cluster: Cluster) -> Step:
    """`arguments` are those of `mor eval`, the run folder first."""
    options = slurm_options(cluster, nodes=1, gpus=min(1, cluster.gpus_per_node or 0), tasks=1)
    # Elements of a chain that are not needed are cancelled, which counts as neither success nor failure.
    condition = "afterok" if cluster.requeue else "afterany"
    return Step(name, "eval", tuple(arguments), options, f"{logs}/eval-%j.out", arguments[0], ((condition, after),))


def slurm_options(cluster: Cluster, *, nodes: int, gpus: int | None, tasks: int | None) -> tuple[str, ...]:
    """Options of sbatch and srun for a job on this cluster, with GPUs and tasks of each node."""
    wanted = {"nodes": nodes, "ntasks-per-node": tasks, "gpus-per-node": gpus}
    wanted |= {name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint", "time")}
    return (*(f"--{name}={value}" for name, value in wanted.items() if value), *cluster.options)


def job_environment(cluster: Cluster) -> dict[str, str]:
    """Variables of `sbatch`, which Slurm hands to the jobs."""
    environ = environment_for_jobs()
    # The nodes may have the accelerator that this machine lacks.
    environ.pop("DS_ACCELERATOR", None)
    environ |= cluster.environment
    activate = Path(sys.prefix) / "bin" / "activate"
    setup = cluster.setup or (f". {shlex.quote(str(activate))}" if activate.is_file() else "true")
    environ |= {"MOR_SETUP": setup, "MOR_LAUNCHER": cluster.launcher, "MOR_HEALTH": cluster.health}
    if cluster.container:
        environ["MOR_CONTAINER"] = cluster.container
    return environ


def _record(step: Step, number: str) -> Record:
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
