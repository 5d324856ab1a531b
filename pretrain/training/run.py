"""One run from start to end: join the other ranks, build, resume, train, export."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch

from data_prep.plain_text import say
from data_prep.tokenizers.loading import copy_recorded_tokenizer
from pretrain.checkpoints.branches import extend, seed_branch
from pretrain.checkpoints.final_weights import export_weights
from pretrain.checkpoints.store import Selected, TrainState, next_start, select_checkpoint
from pretrain.errors import RunError, UserError
from pretrain.ranks.agreement import on_first_rank, require_agreement
from pretrain.ranks.environment import Ranks
from pretrain.ranks.lockstep import BrokenOff, Lockstep
from pretrain.ranks.run_lock import sole_job
from pretrain.ranks.signals import EXIT_FINISHED, StopRequest
from pretrain.ranks.watchdog import Watchdog
from pretrain.recipe.deepspeed_json import STAGES, explain, zero_stage
from pretrain.records.communication import timed_collectives
from pretrain.records.finished import Part, has_finished
from pretrain.records.provenance import changes_since_last_start, describe_environment, identity
from pretrain.records.stopwatch import memory_bytes
from pretrain.training.assembly import build_trainer
from pretrain.training.engine import start_process_group
from pretrain.training.loop import Outcome, Trainer
from pretrain.training.prepare import Prepared, check_folder, prepare_branch
from pretrain.training.session import Session
from pretrain.training.zero_stage import agree_on_stage, with_stage

# Before the first step operators may have to be compiled and a checkpoint read; files may be written slowly, and an
# evaluation prepares its questions. However short a step is, a stall is one only after so long there.
_SLOW_SECONDS = 1800.0


def execute(prepared: Prepared, ranks: Ranks, profiled: tuple[int, int] | None = None) -> int:
    """Train (or go on training) a prepared run and its branches; returns the exit code. Collective over all ranks.

    Args:
        profiled: first and last step to profile, counted from 1.
    """
    limits, folder = prepared.recipe.limits, prepared.folder
    hours = limits.wall_clock_hours
    wall_clock = None if hours is None else hours * 3600
    with StopRequest(folder.path if ranks.rank == 0 else None, wall_clock=wall_clock) as stop:
        # Later than the watchdog, which names the rank that the collective waits for.
        device = start_process_group(ranks, 2 * limits.stall_seconds + _SLOW_SECONDS)
        try:
            prepared = _agree_on_stage(prepared)
            data = prepared.data
            require_agreement(identity(prepared.recipe, prepared.ds_config, data.manifest, data.fingerprint))
            with (
                sole_job(folder.path, ranks),
                Watchdog(folder.path / "stacks", ranks, limits.stall_seconds) as watchdog,
            ):
                patience = max(_SLOW_SECONDS, limits.stall_seconds)
                return _train_parts(prepared, Session(ranks, device, stop, watchdog, patience, profiled))
        finally:
            if torch.distributed.is_initialized():
                deepspeed.comm.destroy_process_group()


def _agree_on_stage(prepared: Prepared) -> Prepared:
    stage = agree_on_stage(prepared.stage, prepared.recipe)
    return replace(prepared, recipe=with_stage(prepared.recipe, stage.config), stage=stage)


def _train_parts(trunk: Prepared, session: Session) -> int:
    """Train the trunk and then its branches, unless they are finished; returns the exit code."""
    # Checked again under the lock: an earlier job may have extended the run meanwhile, and that must not be undone.
    extension = on_first_rank(lambda: check_folder(trunk.recipe, trunk.plan, trunk.data))
    trunk = replace(trunk, extension=extension)
    code = _train_part(trunk, session)
    for branch in trunk.parts[1:]:
        session.watchdog.beat("before a branch", allow=_SLOW_SECONDS)
        if code == EXIT_FINISHED:
            code = _asked_to_stop(session)
        if code != EXIT_FINISHED:
            break
        shorter = prepare_branch(trunk, branch)
        # No rank writes to its folder before all have looked at it.
        torch.distributed.barrier()
        code = _train_part(shorter, replace(session, profiled=None), trunk, branch)
    return code


def _asked_to_stop(session: Session) -> int:
    """The exit code that some rank was asked for since the last step of a run; EXIT_FINISHED to go on. Collective."""
    try:
        Lockstep(session.stop.poll, session.device).meet()
    except BrokenOff as stopped:
        session.stop.acknowledge()
        return stopped.asked.request.exit_code
    return EXIT_FINISHED


def _train_part(run: Prepared, session: Session, trunk: Prepared | None = None, branch: Part | None = None) -> int:
    """Train one run unless it is finished; `trunk` and `branch` tell where a branch comes from."""
    folder = run.folder

    def describe() -> dict[str, Any]:
        return describe_environment(run.recipe, run.ds_config, session.ranks, session.device)

    def begin() -> list[str] | None:
        if run.extension is not None:
            say(extend(folder, run.extension))
        if has_finished(run.recipe):
            return None
        environment = describe()
        changes = changes_since_last_start(folder, environment)
        try:
            _write_folder(run, environment)
            if trunk is not None and branch is not None:
                seed_branch(trunk.folder, folder, branch.start)
        except OSError as error:
            raise RunError(
                f"{folder}: the run cannot be begun there ({error}); make room, or choose another run_dir."
            ) from None
        return changes

    changes = on_first_rank(begin)
    if changes is None:
        return EXIT_FINISHED
    try:
        return _train(run, session, changes, restore=lambda: _write_folder(run, describe()))
    except Exception as error:
        if session.first:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError, RunError):
                status = {key: value for key, value in folder.status().items() if key in ("step", "steps")}
                folder.write_json(folder.status_file, {**status, "state": "failed", "reason": reason})
        raise


def _train(run: Prepared, session: Session, changes: list[str], restore: Callable[[], None]) -> int:
    """Build the loop, train to the end or to a stop, and say how it ended; returns the exit code."""
    watchdog, patience = session.watchdog, session.patience
    watchdog.beat("start", allow=patience)
    describe = {"world_size": session.ranks.world_size, **run.shape}
    selected = select_checkpoint(run.folder.checkpoints, describe, run.recipe.checkpoint)
    memory_before = memory_bytes(session.device)
    trainer, state = build_trainer(run, session, selected, restore)
    _announce(trainer, state, selected, changes, memory_before)
    try:
        with timed_collectives(trainer.stopwatch, watchdog.move):
            outcome = trainer.train(state)
        if outcome.state == "finished":
            watchdog.beat("final weights", allow=patience)
            export_weights(trainer.engine, run.network, run.folder.weights, run.folder.checkpoints)
            trainer.telemetry.event("finished", state.step, flops=state.flops, tokens=state.tokens)
        following = on_first_rank(lambda: _note_end(run, outcome, state))
        trainer.telemetry.say(_closing(run, outcome, state.step, session.stop.reason, following))
        return EXIT_FINISHED if outcome.state == "finished" else outcome.request.exit_code
    finally:
        # An error that all ranks meet ends some of them at once, while others still write a checkpoint.
        watchdog.beat("closing", allow=patience, alone=True)
        trainer.close()


def _announce(
    trainer: Trainer, state: TrainState, selected: Selected | None, changes: Sequence[str], memory_before: int
) -> None:
    """Records and lines about a start: warnings, and what it starts with."""
    run, ranks, telemetry = trainer.run, trainer.session.ranks, trainer.telemetry
    warnings = [run.stage.warning] if run.stage.warning else []
    if selected is not None:
        warnings += [*selected.warnings, *changes]
    for warning in warnings:
        telemetry.say(warning)
        telemetry.event("warning", state.step, text=warning)
    stage = zero_stage(run.ds_config)
    if trainer.session.first:
        telemetry.event(
            "started",
            state.step,
            world_size=ranks.world_size,
            launcher=ranks.launcher,
            memory_bytes=memory_before,
            zero_stage=f"{stage}: {STAGES[stage]}",
            zero_stage_reason=run.stage.reason,
            zero_stages_considered=list(run.stage.considered),
            partitioning=explain(run.ds_config["zero_optimization"], run.network),
        )
        telemetry.say(_headline(run, ranks, state.step))
        status = {"state": "running", "step": state.step, "steps": run.plan.steps}
        run.folder.write_json(run.folder.status_file, status)


def _note_end(run: Prepared, outcome: Outcome, state: TrainState) -> str:
    """Write how the run ended into status.json; returns what another start would do."""
    folder = run.folder
    following = next_start(folder.checkpoints)
    try:
        folder.write_json(folder.status_file, {"state": outcome.state, "step": state.step, "steps": run.plan.steps})
    except OSError as error:
        # After a stop the next start finds the checkpoint without it.
        if outcome.state == "finished":
            raise RunError(
                f"{folder}: the run has finished, but status.json cannot be written ({error.strerror}); make room and "
                f"start the run again, which {following}."
            ) from None
    return following


def _write_folder(run: Prepared, environment: dict[str, Any]) -> None:
    folder, data = run.folder, run.data
    # First, because its presence is what makes a folder a run that can be started again.
    folder.write_text(folder.recipe_file, run.recipe.to_yaml())
    folder.write_json(folder.model_file, run.network.to_dict())
    folder.write_json(folder.environment_file, environment)
    facts = {"tokenizer_fingerprint": data.fingerprint, "data_manifest": data.manifest}
    folder.write_json(folder.plan_file, run.plan.to_dict(facts))
    if not folder.tokenizer.is_dir():
        temporary = folder.path / ".tokenizer.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_recorded_tokenizer(data.tokenizer, data.tokenizer_info, temporary)
        temporary.rename(folder.tokenizer)


def _headline(run: Prepared, ranks: Ranks, step: int) -> str:
    plan, stage = run.plan, zero_stage(run.ds_config)
    begun = f"resuming at step {step} of" if step else "training"
    return (
        f"{run.recipe.name}: {begun} {plan.steps} steps, {plan.tokens / 1e6:,.1f}M tokens, "
        f"{plan.training_flops:.3g} FLOPs; {plan.parameters['total_stored'] / 1e6:.1f}M parameters; "
        f"{ranks.world_size} rank{'s' if ranks.world_size > 1 else ''}, ZeRO stage {stage} ({STAGES[stage]}; "
        f"{run.stage.reason}), {run.recipe.precision}; {run.folder}"
    )


def _closing(run: Prepared, outcome: Outcome, step: int, reason: str | None, following: str) -> str:
    name = run.recipe.name
    if outcome.state == "finished":
        return f"{name}: finished after {step} steps; weights are in {run.folder.weights}"
    why = f" ({reason})" if reason else ""
    return f"{name}: stopped after {step} of {run.plan.steps} steps{why}; another start {following}."
