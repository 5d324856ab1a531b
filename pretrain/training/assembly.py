"""The parts of the training loop, built from a prepared run in the order that DeepSpeed and resuming demand."""

from __future__ import annotations

import functools
from collections.abc import Callable

from pretrain.checkpoints.store import CheckpointStore, Selected, TrainState
from pretrain.ranks.lockstep import Lockstep
from pretrain.records.profiling import StepProfiler
from pretrain.records.stopwatch import Stopwatch
from pretrain.records.telemetry import Telemetry, rewind_metrics
from pretrain.training.batches import BatchReader, merge_ranges
from pretrain.training.engine import build_engine
from pretrain.training.evaluate_in_training import EvaluationHooks, SuiteRunner, held_out_texts
from pretrain.training.loop import Trainer
from pretrain.training.prepare import Prepared
from pretrain.training.session import Session
from pretrain.training.validation import Validator


def build_trainer(
    run: Prepared, session: Session, selected: Selected | None, restore: Callable[[], None]
) -> tuple[Trainer, TrainState]:
    """The loop and the state that it starts from. Collective.

    Args:
        selected: the checkpoint to go on from; None starts anew.
        restore: writes the run folder's own files again, see `CheckpointStore`.
    """
    recipe, plan, device = run.recipe, run.plan, session.device
    ds_config = run.ds_config
    if selected is not None and selected.kind == "universal":
        ds_config = {**ds_config, "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}
    weights = str(selected.folder) if selected is not None and selected.kind == "weights" else recipe.initial_weights
    engine, scheduler = build_engine(recipe, ds_config, plan.learning_rate, weights)
    store = CheckpointStore(
        run.folder.checkpoints,
        engine,
        recipe.checkpoint,
        plan,
        describe={"world_size": session.ranks.world_size, **run.shape},
        restore=restore,
    )
    state = store.load(selected) if selected is not None else TrainState()
    state.skipped = merge_ranges(state.skipped, recipe.data.skip_samples)
    stopwatch = Stopwatch(device)
    profiler = _profiler(run, session, stopwatch, state.step)
    if session.first:
        rewind_metrics(run.folder, state.step, state.unfinished)
    telemetry = Telemetry(run.folder, recipe, plan.steps, active=session.first)
    trainer = Trainer(
        run=run,
        session=session,
        engine=engine,
        scheduler=scheduler,
        reader=_reader(run, session),
        evaluation=_evaluation(run, session, engine, telemetry),
        store=store,
        telemetry=telemetry,
        stopwatch=stopwatch,
        profiler=profiler,
    )
    return trainer, state


def _profiler(run: Prepared, session: Session, stopwatch: Stopwatch, step: int) -> StepProfiler | None:
    if session.profiled is None:
        return None
    folder, rank = run.folder.path / "profile", session.ranks.rank
    profiler = StepProfiler(folder, session.profiled, device=session.device, rank=rank, stopwatch=stopwatch)
    profiler.check(step, run.plan.steps)
    return profiler


def _reader(run: Prepared, session: Session) -> BatchReader:
    return BatchReader(
        run.data.source,
        micro_batch=run.recipe.batch.micro_batch,
        rank=session.ranks.rank,
        world_size=session.ranks.world_size,
        device=session.device,
        end_of_document=_masked_by(run),
        padding=run.data.end_of_document if run.recipe.data.packing == "best-fit" else None,
    )


def _evaluation(run: Prepared, session: Session, engine: object, telemetry: Telemetry) -> EvaluationHooks:
    recipe, lockstep = run.recipe, Lockstep(session.stop.poll, session.device, session.watchdog.move)
    validator = suites = None
    if run.data.validation:
        validator = Validator(
            engine,
            run.data.validation,
            length=run.plan.sequence_length,
            micro_batch=recipe.batch.micro_batch,
            routed=run.network.router is not None,
            end_of_document=_masked_by(run),
            device=session.device,
            lockstep=lockstep,
        )
    if recipe.evaluation.suites is not None:
        suites = SuiteRunner(
            engine,
            recipe.evaluation.suites,
            folder=run.folder,
            telemetry=telemetry,
            tokenizer=run.data.tokenizer,
            texts=held_out_texts(recipe),
            device=session.device,
            lockstep=lockstep,
        )
    return EvaluationHooks(
        plan=run.plan,
        max_share=recipe.evaluation.max_share,
        validator=validator,
        suites=suites,
        telemetry=telemetry,
        beat=functools.partial(session.watchdog.beat, allow=session.patience),
        lockstep=lockstep,
    )


def _masked_by(run: Prepared) -> int | None:
    """END_OF_DOCUMENT where attention stays inside a document, else None."""
    return run.data.end_of_document if run.network.document_masking else None
