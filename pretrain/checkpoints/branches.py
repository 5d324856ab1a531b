"""Several budgets of one run: smaller ones branch off its trunk, and the trunk can be extended to another budget.

Until its learning rate decays, a run does not depend on its length, so the steps up to there serve every budget. A
branch starts from the trunk's checkpoint. A run whose budget or schedule has changed resumes from the last checkpoint
that both have in common, and its old end becomes a branch.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from data_prep.files import atomic_write, write_text
from pretrain.checkpoints.checkpoint_manifest import checkpoint_name
from pretrain.checkpoints.store import find_damage, list_checkpoints
from pretrain.errors import RunError
from pretrain.recipe.plan import Branch, Plan, make_plan, weight_phases
from pretrain.recipe.recipe import Recipe
from pretrain.records.finished import branch_path, branch_recipe
from pretrain.records.run_folder import RunFolder


@dataclass(frozen=True)
class Extension:
    """A run folder that was started with another budget or schedule.

    Attributes:
        before: the recipe it was started with; start: step of the last common checkpoint, 0 for none.
    """

    before: Recipe
    start: int


def seed_branch(trunk: RunFolder, branch: RunFolder, start: int) -> None:
    """Give a branch the trunk's last checkpoint within its first `start` steps, and the trunk's records; rank 0 only.

    Raises:
        RunError: when there is no sound one.
    """
    if list_checkpoints(branch.checkpoints):
        return
    found = sorted((step for step, _ in list_checkpoints(trunk.checkpoints) if step <= start), reverse=True)
    sound = next((step for step in found if find_damage(trunk.checkpoints / checkpoint_name(step)) is None), None)
    if sound is None:
        raise _no_beginning(trunk, branch.name, start)
    name = checkpoint_name(sound)
    branch.checkpoints.mkdir(parents=True, exist_ok=True)
    if not branch.metrics_file.exists():
        # Written atomically: after a kill half-way, the next start would not copy the rest.
        with atomic_write(branch.metrics_file) as stream:
            stream.write(trunk.metrics_file.read_bytes())
    _copy(trunk.checkpoints / name, branch.checkpoints / name)


def find_extension(folder: RunFolder, before: Recipe, now: Recipe, plan: Plan) -> Extension:
    """Where a run that was started with the recipe `before` can resume with `now`, whose plan is `plan`.

    Raises:
        RunError: when the two differ from before the first checkpoint on, or a new branch leaves before it.
    """
    alike = common_steps(before, now, plan)
    steps = sorted(step for step, _ in list_checkpoints(folder.checkpoints))
    start = max((step for step in steps if step <= alike), default=0)
    if steps and not start:
        raise RunError(
            f"{folder}: was begun with {_describe(before)}, and with {_describe(now)} its steps are others from step "
            f"{alike + 1} on, before the first checkpoint ({steps[0]}). Only what comes after a stable learning rate "
            f"can change: keep schedule.kind wsd or constant and set schedule.warmup to "
            f"{make_plan(before).learning_rate.warmup} (steps), or start a new run in another run_dir."
        )
    for branch in plan.branches:
        if branch.start < min(steps, default=0) and not branch_path(folder, branch).exists():
            raise _no_beginning(folder, branch.name, branch.start)
    return Extension(before, start)


def common_steps(before: Recipe, now: Recipe, plan: Plan) -> int:
    """Number of steps that are the same in two recipes which differ only in budget and schedule."""
    old = make_plan(before)

    def told(plan: Plan, step: int) -> tuple[object, ...]:
        recursion = plan.recursion
        return (
            plan.learning_rate.factor(step),
            plan.batch.at(step),
            recursion.capacities_at(step),
            recursion.depth_at(step),
        )

    limit = min(old.steps, plan.steps)
    changes = zip_longest(weight_phases(before, old), weight_phases(now, plan))
    differing = next((pair for pair in changes if pair[0] != pair[1]), None)
    if differing is not None:
        sample = min(phase.first_sample for phase in differing if phase is not None)
        limit = next(step for step in range(limit, -1, -1) if plan.batch.before(step) <= sample)
    return next((step for step in range(limit) if told(old, step) != told(plan, step)), limit)


def extend(folder: RunFolder, extension: Extension) -> str:
    """Take a run back to where its old and its new budget differ; rank 0 only.

    The rest is moved to RUN/branches/<old budget>, a run folder that keeps the old recipe. Can be killed at any moment
    and called again.

    Returns:
        what was done, as a sentence.
    """
    before, start = extension.before, extension.start
    plan = make_plan(before)
    old = Branch(before.budget.amount, start, plan.steps)
    branch = branch_path(folder, old)
    later = [name for step, name in list_checkpoints(folder.checkpoints) if step > start]
    finished = folder.status().get("state") == "finished"
    said = f"The budget was {_describe(before)}; going on from step {start}."
    if (later or finished) and not branch.exists():
        temporary = branch.with_name(f".{branch.name}.moving")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # The files are copied, because a run folder's are added to; wandb and TensorBoard go on with the trunk.
        files = (folder.model_file, folder.environment_file, folder.plan_file, folder.metrics_file, folder.status_file)
        for file in files:
            if file.exists():
                shutil.copy2(file, temporary)
        for place in (folder.tokenizer, folder.weights, folder.evaluation):
            if place.is_dir():
                shutil.copytree(place, temporary / place.name, symlinks=True, copy_function=_link)
        target = RunFolder(temporary)
        recipe = branch_recipe(before, old.amount, old.name, plan.learning_rate.warmup, branch)
        target.write_text(target.recipe_file, recipe.to_yaml())
        for name in later:
            _copy(folder.checkpoints / name, target.checkpoints / name)
        temporary.rename(branch)
    if later or finished:
        said += f" What it had come to is in {branch}."
    folder.status_file.unlink(missing_ok=True)
    results = folder.evaluation.iterdir() if folder.evaluation.is_dir() else ()
    outdated = [entry for entry in results if not (_is_step(entry.name) and int(entry.name[5:]) <= start)]
    for place in (*(folder.checkpoints / name for name in later), folder.weights, *outdated):
        if place.is_dir():
            doomed = place.with_name(f".{place.name}.removing")
            shutil.rmtree(doomed, ignore_errors=True)  # what a kill has left of another one of that name
            place.rename(doomed)
            shutil.rmtree(doomed)
        else:
            place.unlink(missing_ok=True)
    if start:
        write_text(folder.checkpoints / "latest", checkpoint_name(start) + "\n")
    return said


def _no_beginning(trunk: RunFolder, name: str, start: int) -> RunError:
    return RunError(
        f"{trunk.checkpoints}: the branch {name} leaves the trunk after {start} steps, and there is no sound "
        "checkpoint up to there; restore one, or train that budget as a run of its own."
    )


def _is_step(name: str) -> bool:
    return name.startswith("step-") and name[5:].isdigit()


def _describe(recipe: Recipe) -> str:
    return f"{recipe.budget.amount:g} {recipe.budget.unit} and the {recipe.schedule.kind} schedule"


def _copy(source: Path, target: Path) -> None:
    """Link a folder's files, which are never written again; `target` is whole or absent. Symbolic links stay links: one
    could lead to any folder.
    """
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, symlinks=True, copy_function=_link)
    temporary.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
