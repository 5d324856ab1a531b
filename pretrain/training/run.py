"""One run from start to end: join the other ranks, build, resume, train, export."""

from __future__ import annotations

import contextlib
import functools
import shutil
from dataclasses import replace
from typing import Any

from data_prep.plain_text import say
from data_prep.tokenizers.loading import copy_recorded_tokenizer
from pretrain.checkpoints.branches import extend, seed_branch
from pretrain.errors import RunError, UserError
from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import EXIT_FINISHED, StopRequest
from pretrain.ranks.watchdog import Watchdog
from pretrain.recipe.deepspeed_json import STAGES, explain, resolve_ds_config, zero_stage
from pretrain.records.finished import has_finished
from pretrain.records.provenance import changes_since_last_start, describe_environment, identity
from pretrain.training.prepare import Prepared, check_folder, prepare_branch
from pretrain.training.zero_stage import agree_on_stage, with_stage

# Before the first step operators may have to be compiled and a checkpoint read; files may be written slowly, and an
# evaluation prepares its questions. A stall is one only after so long there, however short a step is.
_SLOW_SECONDS = 1800.0


def execute(prepared: Prepared, ranks: Ranks, profiled: tuple[int, int] | None = None) -> int:
    """Train (or go on training) a prepared run and its branches; returns the exit code. Collective over all ranks.

    Args:
        profiled: first and last step to profile, counted from 1.
    """
    import deepspeed
    import torch

    from pretrain.ranks.agreement import on_first_rank, require_agreement
    from pretrain.ranks.run_lock import sole_job
    from pretrain.training.engine import start_process_group

    recipe, folder, first = prepared.recipe, prepared.folder, ranks.rank == 0
    hours = recipe.limits.wall_clock_hours
    with StopRequest(folder.path if first else None, wall_clock=None if hours is None else hours * 3600) as stop:
        # Later than the watchdog, which names the rank that the collective waits for.
        device = start_process_group(ranks, 2 * recipe.limits.stall_seconds + _SLOW_SECONDS)
        try:
            prepared = _agree_on_stage(prepared, ranks)
            data = prepared.data
            require_agreement(identity(prepared.recipe, prepared.ds_config, data.manifest, data.fingerprint))
            with (
                sole_job(folder.path, ranks),
                Watchdog(folder.path / "stacks", ranks, recipe.limits.stall_seconds) as watchdog,
            ):
                # Again, now that nobody else changes it: the job before may have gone where this one wants to, and must
                # not be taken back.
                extension = on_first_rank(lambda: check_folder(folder, recipe, prepared.plan, prepared.data))
                prepared = replace(prepared, extension=extension)
                code = _train_one(prepared, ranks, device, stop, watchdog, profiled=profiled)
                for branch in prepared.plan.branches:
                    watchdog.beat("before a branch", allow=_SLOW_SECONDS)
                    if code == EXIT_FINISHED:
                        code = _asked_to_stop(stop, device)
                    if code != EXIT_FINISHED:
                        break
                    shorter = prepare_branch(prepared, branch, ranks)
                    # No rank writes to its folder before all have looked at it.
                    torch.distributed.barrier()
                    code = _train_one(shorter, ranks, device, stop, watchdog, trunk=prepared, start=branch.start)
                return code
        finally:
            if torch.distributed.is_initialized():
                deepspeed.comm.destroy_process_group()


def _asked_to_stop(stop: StopRequest, device: Any) -> int:
    """The exit code that some rank was asked for since the last step of a run; EXIT_FINISHED to go on. Collective."""
    from pretrain.ranks.lockstep import BrokenOff, Lockstep

    try:
        Lockstep(stop.poll, device).meet()
    except BrokenOff as stopped:
        stop.acknowledge()
        return stopped.asked.request.exit_code
    return EXIT_FINISHED


def _agree_on_stage(prepared: Prepared, ranks: Ranks) -> Prepared:
    stage = agree_on_stage(prepared.stage)
    if stage.config == prepared.stage.config:
        return prepared
    recipe = with_stage(prepared.recipe, stage.config)
    return replace(prepared, recipe=recipe, stage=stage, ds_config=resolve_ds_config(recipe, ranks.world_size))


def _train_one(
    prepared: Prepared,
    ranks: Ranks,
    device: Any,
    stop: StopRequest,
    watchdog: Watchdog,
    trunk: Prepared | None = None,
    start: int = 0,
    profiled: tuple[int, int] | None = None,
) -> int:
    """Train one run unless it is finished; `trunk` and `start` are where a branch comes from."""
    from pretrain.ranks.agreement import on_first_rank

    folder = prepared.folder
    facts = describe_environment(prepared.recipe, prepared.ds_config, ranks, device)

    def begin() -> list[str] | None:
        if prepared.extension is not None:
            say(extend(folder, prepared.extension))
        if has_finished(prepared.recipe):
            return None
        changes = changes_since_last_start(folder, facts)
        try:
            _write_folder(prepared, facts)
            if trunk is not None:
                seed_branch(trunk.folder, folder, start)
        except OSError as error:
            raise RunError(
                f"{folder}: the run cannot be begun there ({error}); make room, or choose another run_dir."
            ) from None
        return changes

    changes = on_first_rank(begin)
    if changes is None:
        return EXIT_FINISHED
    try:
        return _train(prepared, ranks, device, stop, watchdog, profiled, facts, changes)
    except Exception as error:
        if ranks.rank == 0:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError, RunError):
                status = {key: value for key, value in folder.status().items() if key in ("step", "steps")}
                folder.write_json(folder.status_file, {**status, "state": "failed", "reason": reason})
        raise


def _train(
    prepared: Prepared,
    ranks: Ranks,
    device: Any,
    stop: StopRequest,
    watchdog: Watchdog,
    profiled: tuple[int, int] | None,
    facts: dict[str, Any],
    changes: list[str],
) -> int:
    from pretrain.checkpoints.final_weights import export_weights
    from pretrain.checkpoints.store import CheckpointStore, TrainState, next_start, select_checkpoint
    from pretrain.ranks.agreement import on_first_rank
    from pretrain.ranks.lockstep import Lockstep
    from pretrain.records.communication import timed_collectives
    from pretrain.records.profiling import StepProfiler
    from pretrain.records.stopwatch import Stopwatch, memory_bytes
    from pretrain.records.telemetry import Telemetry, rewind_metrics
    from pretrain.training.batches import BatchReader, merge_ranges
    from pretrain.training.engine import build_engine, peak_flops
    from pretrain.training.evaluate_in_training import EvaluationHooks, SuiteRunner, held_out_texts
    from pretrain.training.loop import Trainer
    from pretrain.training.validation import Validator

    recipe, config, plan, data, folder = (
        prepared.recipe,
        prepared.config,
        prepared.plan,
        prepared.data,
        prepared.folder,
    )
    first = ranks.rank == 0
    patience = max(_SLOW_SECONDS, recipe.limits.stall_seconds)
    watchdog.beat("start", allow=patience)
    describe = {"world_size": ranks.world_size, **prepared.shape}
    selected = select_checkpoint(folder.checkpoints, describe, recipe.checkpoint)
    ds_config = prepared.ds_config
    if selected is not None and selected.universal:
        ds_config = {**ds_config, "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}
    memory_before = memory_bytes(device)
    weights = str(selected.folder) if selected is not None and selected.weights_only else recipe.initial_weights
    engine, peak_rates = build_engine(recipe, config, ds_config, weights)
    store = CheckpointStore(
        folder.checkpoints,
        engine,
        recipe.checkpoint,
        keep_every=plan.keep_every,
        pinned=plan.trunk_checkpoints,
        describe=describe,
        restore=lambda: _write_folder(prepared, facts),
    )
    state = store.load(selected) if selected is not None else TrainState()
    state.skipped = merge_ranges(state.skipped, recipe.data.skip_samples)
    stopwatch = Stopwatch(device)
    profiler = None
    if profiled is not None:
        profiler = StepProfiler(folder.path / "profile", profiled, device=device, rank=ranks.rank, stopwatch=stopwatch)
        profiler.check(state.step, plan.steps)
    if first:
        rewind_metrics(folder, state.step, state.unfinished)
    telemetry = Telemetry(folder, recipe, plan.steps, active=first)
    warnings = [*([prepared.stage.warning] if prepared.stage.warning else []), *(selected.warnings if selected else ())]
    warnings += changes if selected is not None else []
    for warning in warnings:
        telemetry.say(warning)
        telemetry.event("warning", state.step, text=warning)
    if first:
        telemetry.event(
            "started",
            state.step,
            world_size=ranks.world_size,
            launcher=ranks.launcher,
            memory_bytes=memory_before,
            zero_stage=f"{zero_stage(ds_config)}: {STAGES[zero_stage(ds_config)]}",
            zero_stage_reason=prepared.stage.reason,
            zero_stages_considered=list(prepared.stage.considered),
            partitioning=explain(ds_config["zero_optimization"], config),
        )
        telemetry.say(_headline(prepared, ranks, state.step))
        folder.write_json(folder.status_file, {"state": "running", "step": state.step, "steps": plan.steps})
    end_of_document = data.end_of_document if config.document_masking else None
    reader = BatchReader(
        data.source,
        micro_batch=recipe.batch.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        end_of_document=end_of_document,
        padding=data.end_of_document if recipe.data.packing == "best-fit" else None,
    )
    lockstep = Lockstep(stop.poll, device, watchdog.move)
    validator = None
    if data.validation:
        validator = Validator(
            engine,
            data.validation,
            length=plan.sequence_length,
            micro_batch=recipe.batch.micro_batch,
            routed=config.router is not None,
            end_of_document=end_of_document,
            device=device,
            lockstep=lockstep,
        )
    suites = None
    if recipe.evaluation.suites is not None:
        suites = SuiteRunner(
            engine,
            recipe.evaluation.suites,
            folder=folder,
            telemetry=telemetry,
            tokenizer=data.tokenizer,
            texts=held_out_texts(recipe),
            device=device,
            lockstep=lockstep,
        )
    evaluation = EvaluationHooks(
        plan=plan,
        max_share=recipe.evaluation.max_share,
        validator=validator,
        suites=suites,
        telemetry=telemetry,
        beat=functools.partial(watchdog.beat, allow=patience),
        lockstep=lockstep,
    )
    trainer = Trainer(
        recipe=recipe,
        config=config,
        plan=plan,
        ranks=ranks,
        device=device,
        engine=engine,
        peak_rates=peak_rates,
        reader=reader,
        source=data.source,
        evaluation=evaluation,
        store=store,
        telemetry=telemetry,
        stop=stop,
        watchdog=watchdog,
        peak_flops=peak_flops(device),
        stopwatch=stopwatch,
        profiler=profiler,
        patience=patience,
    )
    try:
        with timed_collectives(stopwatch, watchdog.move):
            outcome = trainer.train(state)
        if outcome.state == "finished":
            watchdog.beat("final weights", allow=patience)
            export_weights(engine, config, folder.weights, folder.checkpoints)
            telemetry.event("finished", state.step, flops=state.flops, tokens=state.tokens)

        def note() -> str:
            following = next_start(folder.checkpoints)
            try:
                folder.write_json(folder.status_file, {"state": outcome.state, "step": state.step, "steps": plan.steps})
            except OSError as error:
                # After a stop the next start finds the checkpoint without it.
                if outcome.state == "finished":
                    raise RunError(
                        f"{folder}: the run has finished, but status.json cannot be written ({error.strerror}); make "
                        f"room and start the run again, which {following}."
                    ) from None
            return following

        telemetry.say(_closing(prepared, outcome.state, state.step, stop.reason, on_first_rank(note)))
        return EXIT_FINISHED if outcome.state == "finished" else outcome.request.exit_code
    finally:
        # An error that all ranks meet ends some of them at once, while others still write a checkpoint.
        watchdog.beat("closing", allow=patience, alone=True)
        reader.close()
        store.close()
        telemetry.close()
        engine.destroy()


def _write_folder(prepared: Prepared, environment: dict[str, Any]) -> None:
    folder, data = prepared.folder, prepared.data
    # First, because its presence is what makes a folder a run that can be started again.
    folder.write_text(folder.recipe_file, prepared.recipe.to_yaml())
    folder.write_json(folder.model_file, prepared.config.to_dict())
    folder.write_json(folder.environment_file, environment)
    facts = {"tokenizer_fingerprint": data.fingerprint, "data_manifest": data.manifest}
    folder.write_json(folder.plan_file, prepared.plan.to_dict(facts))
    if not folder.tokenizer.is_dir():
        temporary = folder.path / ".tokenizer.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_recorded_tokenizer(data.tokenizer, data.tokenizer_info, temporary)
        temporary.rename(folder.tokenizer)


def _headline(prepared: Prepared, ranks: Ranks, step: int) -> str:
    plan = prepared.plan
    begun = f"resuming at step {step} of" if step else "training"
    return (
        f"{prepared.recipe.name}: {begun} {plan.steps} steps, {plan.tokens / 1e6:,.1f}M tokens, "
        f"{plan.training_flops:.3g} FLOPs; "
        f"{plan.parameters['total_stored'] / 1e6:.1f}M parameters; {ranks.world_size} "
        f"rank{'s' if ranks.world_size > 1 else ''}, "
        f"ZeRO stage {zero_stage(prepared.ds_config)} ({STAGES[zero_stage(prepared.ds_config)]}; "
        f"{prepared.stage.reason}), "
        f"{prepared.recipe.precision}; {prepared.folder}"
    )


def _closing(prepared: Prepared, state: str, step: int, reason: str | None, following: str) -> str:
    if state == "finished":
        return f"{prepared.recipe.name}: finished after {step} steps; weights are in {prepared.folder.weights}"
    why = f" ({reason})" if reason else ""
    return (
        f"{prepared.recipe.name}: stopped after {step} of {prepared.plan.steps} steps{why}; another start {following}."
    )
