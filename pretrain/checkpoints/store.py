"""Checkpoints that are whole or absent, and the way back to the newest one that is sound.

    checkpoints/step-00000100/    DeepSpeed's files and checkpoint.json (written last: sizes, checksums, training state)
    checkpoints/latest            name of the newest

A checkpoint is written under a temporary name, flushed, and renamed when every rank's files are complete. `latest` is
only a hint for people and tools: resuming looks at the folders themselves and takes the newest one whose files agree
with checkpoint.json.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from data_prep.errors import DataError
from data_prep.files import sha256_file, sync_folder, write_text
from data_prep.plain_text import plain
from pretrain.checkpoints.checkpoint_manifest import (
    MANIFEST,
    Manifest,
    TrainState,
    checkpoint_name,
    read_manifest,
    write_manifest,
)
from pretrain.checkpoints.convert import to_universal, to_weights
from pretrain.checkpoints.restricted_loading import load_restricted, refuse_code, restricted_loading
from pretrain.errors import RunError
from pretrain.ranks.agreement import on_first_rank
from pretrain.recipe.plan import Plan, is_due
from pretrain.recipe.sections import Checkpoint
from pretrain.records.run_folder import RunFolder

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")
_READ_AGAIN_SECONDS = (0.5, 2.0, 5.0)


@dataclass(frozen=True)
class Selected:
    """A sound checkpoint to go on from.

    Attributes:
        origin: the checkpoint; folder: the files to read, which are its own or were converted from them.
        kind: how to read them: `own`, `universal` (converted for another world size), or `weights`, with which the
            network is built.
        state: where the run stood.
        warnings: what was passed over on the way to it, and what of it is not carried.
    """

    origin: Path
    folder: Path
    kind: Literal["own", "universal", "weights"]
    state: TrainState
    warnings: tuple[str, ...]


def select_checkpoint(folder: Path, describe: dict[str, Any], settings: Checkpoint) -> Selected | None:
    """The newest sound checkpoint in RUN/checkpoints; None when there is none. Collective; rank 0 does the reading.

    Args:
        describe: what it must have been written with: world_size, zero_stage, precision, optimizer.
        settings: whether it may be converted: to a universal one where the world size alone differs, to its weights
            where the ZeRO stage does.

    Raises:
        RunError: on all ranks, when checkpoints are there but none is sound, or the newest sound one is of another
            shape or holds code.
    """

    def select() -> Selected | None:
        warnings: list[str] = []
        found = sorted(list_checkpoints(folder), reverse=True)
        for _, name in found:
            problem = find_damage(folder / name)
            if problem is not None:
                warnings.append(f"Checkpoint {folder / name} is damaged ({problem}); trying the one before it.")
                continue
            manifest = read_manifest(folder / name)
            refusal = refuse_shape(folder / name, manifest, describe, settings)
            if refusal is not None:
                raise RunError(refusal)
            for file in manifest.files:
                refuse_code(folder / name / file)
            wrong = _differences(manifest, describe)
            origin = files = folder / name
            kind: Literal["own", "universal", "weights"] = "own"
            # At stage 0 one file holds everything, and every rank reads it.
            if wrong == ["world_size"] and describe["zero_stage"]:
                files, kind = to_universal(origin), "universal"
            elif wrong and wrong != ["world_size"]:
                files, kind = to_weights(origin, manifest.zero_stage), "weights"
                warnings.append(_not_carried(origin, manifest, describe))
            return Selected(origin, files, kind, manifest.state, tuple(warnings))
        if found:
            raise RunError(
                f"{folder}: all {len(found)} checkpoints are damaged; restore one from a copy, "
                "or remove the folder to start over."
            )
        return None

    return on_first_rank(select)


def refuse_shape(checkpoint: Path, manifest: Manifest, describe: dict[str, Any], settings: Checkpoint) -> str | None:
    """Why a start with `describe` cannot go on from a checkpoint, as a sentence; None where it can, see
    `select_checkpoint`.
    """
    wrong = _differences(manifest, describe)
    if not wrong or (wrong == ["world_size"] and settings.universal):
        return None
    if "zero_stage" in wrong and set(wrong) <= {"zero_stage", "world_size"} and settings.weights_only:
        return None
    key, then = wrong[-1], getattr(manifest, wrong[-1])
    return f"{checkpoint}: written with {key} {then}, but this start has {describe[key]}; {_shape_advice(key, then)}"


def _differences(manifest: Manifest, describe: dict[str, Any]) -> list[str]:
    return [key for key, now in describe.items() if getattr(manifest, key) != now]


class CheckpointStore:
    """Checkpoints of one run. All methods that take an engine are collective: every rank calls them in the same step.

    Args:
        folder: RUN/checkpoints; engine: DeepSpeed's; settings: the recipe's.
        plan: says at which steps a checkpoint is written and which of them stay.
        describe: what a checkpoint must match to be resumed: world_size, zero_stage, precision, optimizer.
        restore: writes the run folder's own files, for when they are gone: a checkpoint without them is no run.

    Attributes:
        seconds: what the last checkpoint took, from its begin to its end.
        failed: step of the first checkpoint that could not be written since the last one that was.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        settings: Checkpoint,
        plan: Plan,
        *,
        describe: dict[str, Any],
        restore: Callable[[], None],
    ) -> None:
        from pretrain.checkpoints.checkpoint_engine import CheckpointFiles

        self.folder = folder
        self._engine = engine
        self._settings = settings
        self._plan = plan
        self._describe, self._restore = describe, restore
        self._rank = dist.get_rank()
        self._files = CheckpointFiles(asynchronous=settings.asynchronous)
        self._open: dict[str, Any] | None = None
        self._began = 0.0
        self._last = time.monotonic()
        self.seconds = 0.0
        self.failed: int | None = None
        engine.checkpoint_engine = self._files
        # DeepSpeed copies scripts beside the checkpoints; on a full disk that would raise on rank 0 alone.
        engine._copy_recovery_script = lambda save_path: None

    @property
    def writing(self) -> bool:
        """True between `begin` and `finish` of an asynchronous checkpoint."""
        return self._open is not None

    def due(self, state: TrainState) -> bool:
        """Whether a checkpoint of this state is to be written."""
        step = state.step
        return (
            is_due(step, self._plan.checkpoint_every, self._plan.steps)
            or self._stays(step, state.best_validation)
            # The next one may be days away: one that failed is tried again after 1, 2, 4, ... steps.
            or (self.failed is not None and _is_power_of_two(step - self.failed))
        )

    def _stays(self, step: int, best: tuple[float, int] | None) -> bool:
        """Whether a step's checkpoint is kept however many newer ones there are."""
        return (
            step in self._plan.trunk_checkpoints
            or (self._settings.log_spaced and _is_power_of_two(step))
            or (self._settings.keep_best and best is not None and best[1] == step)
        )

    @property
    def overdue(self) -> bool:
        """True on rank 0, which decides for all, when more minutes have passed than may lie between checkpoints."""
        minutes = self._settings.every_minutes
        if minutes is None or self._rank != 0 or self.writing:
            return False
        return time.monotonic() - self._last >= 60.0 * minutes

    @property
    def written(self) -> bool:
        """True when this rank's part of the open checkpoint is on the disk."""
        return self._open is not None and self._files.done

    def begin(self, state: TrainState) -> None:
        """Write the files of a checkpoint under a temporary name, or start to, when asynchronous."""
        name = checkpoint_name(state.step)
        temporary = f".{name}.writing"
        self._began = time.perf_counter()
        self._files.start()
        if self._rank == 0:
            # What a killed start has left behind would fill the disk.
            with contextlib.suppress(OSError):
                for unfinished in self.folder.glob(".step-*.writing"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        self._engine.save_checkpoint(str(self.folder), tag=temporary, save_latest=False)
        self._open = {"name": name, "temporary": temporary, "state": state.to_dict()}

    def finish(self, step: int) -> str | None:
        """Wait for every rank's files and give the checkpoint its name; returns what went wrong, if anything did.
        `step`: the last finished one, for trying again later.

        A failure leaves the older checkpoints as they were, and training can go on.
        """
        assert self._open is not None
        opened, self._open = self._open, None
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, self._files.collect())
        problem = [next((error for _, error in reports if error), None)]
        if self._rank == 0:
            if problem[0] is None:
                files = {name: facts for written, _ in reports for name, facts in written.items()}
                try:
                    self._publish(opened, files)
                except (OSError, DataError) as error:  # DataError: the data set whose tokenizer is copied is gone too
                    problem = [f"{self.folder / opened['name']}: {error}"]
            if problem[0] is not None:
                shutil.rmtree(self.folder / opened["temporary"], ignore_errors=True)
        dist.broadcast_object_list(problem, src=0)
        self.seconds = time.perf_counter() - self._began
        # From its end, or one that takes longer than it may be apart would leave no time to train.
        self._last = time.monotonic()
        if problem[0] is None:
            self.failed = None
        elif self.failed is None:
            self.failed = step
        return problem[0]

    def newest(self) -> Selected | None:
        """The newest sound checkpoint of this very run; None where there is none that can be loaded as it is."""
        as_they_are = self._settings.model_copy(update={"universal": False, "weights_only": False})
        try:
            return select_checkpoint(self.folder, self._describe, as_they_are)
        except RunError:  # damaged, or of another number of ranks, which this start was converted from
            return None

    def load(self, selected: Selected) -> TrainState:
        """Load a selected checkpoint into the engine and return where the run stood. Weights alone are loaded already:
        the engine was built with them.
        """
        if self._rank == 0:
            # It named another one where that was found damaged, or where a kill came between the two.
            with contextlib.suppress(OSError):
                write_text(self.folder / "latest", selected.origin.name + "\n")
        if selected.kind == "weights":
            return selected.state
        folder = selected.folder
        groups = self._engine.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        with restricted_loading(folder):
            self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if selected.kind == "universal":
            # DeepSpeed gives every group the first one's settings, and all of Adam's states one step counter, which
            # every one of them then advances.
            for group, own in zip(self._engine.optimizer.param_groups, settings):
                group.update(own)
            for moments in self._engine.optimizer.optimizer.state.values():
                moments["step"] = torch.as_tensor(moments["step"]).clone()
            self._load_buffers(selected.origin)
        return selected.state

    def _load_buffers(self, origin: Path) -> None:
        """Buffers, which a universal checkpoint leaves out, from the checkpoint that it was made of."""
        buffers = dict(self._engine.module.named_buffers())
        if buffers:
            file = sorted(origin.glob("*model_states.pt"))[0]
            saved = load_restricted(file, map_location="cpu")["module"]
            for name, buffer in buffers.items():
                if name in saved:
                    buffer.copy_(saved[name])

    def close(self) -> None:
        """End the writing thread."""
        self._files.close()

    def _publish(self, opened: dict[str, Any], files: dict[str, Any]) -> None:
        temporary = self.folder / opened["temporary"]
        final = self.folder / opened["name"]
        if not RunFolder(self.folder.parent).recipe_file.is_file():
            # Removed or moved while training: what is written from now on is a run that can be started again.
            self._restore()
        write_manifest(temporary, self._describe, opened["state"], files)
        sync_folder(temporary)
        if final.exists():
            # Only after a fall back past it: the damaged or superseded one makes room.
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(self.folder)
        write_text(self.folder / "latest", opened["name"] + "\n")
        self._rotate(opened["state"])

    def _rotate(self, state: dict[str, Any]) -> None:
        steps = sorted(step for step, _ in list_checkpoints(self.folder))
        # Later ones were found damaged when this start resumed from an older one; they must not count as the newest.
        sound = [step for step in steps if step <= state["step"]]
        every, best = self._plan.keep_every, state["best_validation"]
        keep = set(sound[-self._settings.keep :])
        keep |= {step for step in sound if self._stays(step, best) or (every and step % every == 0)}
        for step in steps:
            if step not in keep or step > state["step"]:
                # Renamed first, so that a kill in between leaves no half checkpoint under a sound name.
                doomed = self.folder / f".{checkpoint_name(step)}.removing"
                shutil.rmtree(doomed, ignore_errors=True)  # what a kill has left of another one of that name
                os.rename(self.folder / checkpoint_name(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for pattern in (".step-*.removing", ".step-*.universal", ".step-*.converting", ".step-*.weights"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def list_checkpoints(folder: Path) -> list[tuple[int, str]]:
    """(step, folder name) of every finished checkpoint in RUN/checkpoints."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return [(int(match[1]), entry.name) for match, entry in matches if match and (entry / MANIFEST).is_file()]


def next_start(folder: Path) -> str:
    """What another start of the run in RUN/checkpoints does, as the end of a sentence."""
    try:
        steps = [step for step, _ in list_checkpoints(folder)]
    except OSError as error:
        return f"goes on from its last checkpoint, if {folder} can be read again ({error.strerror})"
    return (
        f"goes on from its checkpoint of step {max(steps)}" if steps else "starts over, because there is no checkpoint"
    )


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: each is there, can be read and has its checksum. What the file
    system does not give at once is asked for again, because a checkpoint that is passed over is lost.
    """
    for pause in (*_READ_AGAIN_SECONDS, None):
        try:
            return _compare_files(checkpoint)
        except OSError as error:
            if pause is None:
                return f"{error.filename} cannot be read: {error.strerror}"
            time.sleep(pause)
    raise AssertionError("the last attempt returns")


def _compare_files(checkpoint: Path) -> str | None:
    try:
        files = read_manifest(checkpoint).files
    except RunError as error:
        return str(error).removesuffix(".")
    for name, facts in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {facts.bytes}"
        if sha256_file(file) != facts.sha256:
            return f"{name} does not match its checksum"
    # DeepSpeed takes what lies there by patterns of names.
    strangers = sorted(entry.name for entry in checkpoint.glob("*.pt") if entry.name not in files)
    return f"{plain(strangers[0])!r} was put there later; remove it" if strangers else None


def _shape_advice(key: str, then: Any) -> str:
    if key == "world_size":
        return f"start it with {then} ranks, or set checkpoint.universal=true to convert it."
    if key == "zero_stage":
        return (
            f"use a DeepSpeed configuration of stage {then}, or set checkpoint.weights_only=true to go on with the "
            "weights alone; optimiser states cannot change their stage."
        )
    return f"set {key} back to {then}."


def _not_carried(checkpoint: Path, then: Manifest, now: dict[str, Any]) -> str:
    half = now["precision"] in ("bf16", "fp16")
    rounded = f" (rounded to {now['precision']})" if half else ""
    return (
        f"{checkpoint} was written at ZeRO stage {then.zero_stage}, and this start is at stage {now['zero_stage']}: "
        f"the weights{rounded}, the step, the position in the data and the routing state are carried over; the "
        "optimiser's moments and the loss scale are not and begin anew, so the loss will differ for some steps."
    )
