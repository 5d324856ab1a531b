"""`--dry-run`: what a run would be, from its checked recipe, without training it."""

from __future__ import annotations

import json
import statistics

import torch

from data_prep.terminal import duration
from pretrain.checkpoints.checkpoint_manifest import read_manifest
from pretrain.checkpoints.store import list_checkpoints, refuse_shape
from pretrain.errors import RunError
from pretrain.ranks.environment import Ranks
from pretrain.recipe.deepspeed_json import STAGES, explain, zero_stage
from pretrain.recipe.recipe import Recipe
from pretrain.training.engine import peak_flops
from pretrain.training.memory import estimate_memory
from pretrain.training.memory import format_bytes as size
from pretrain.training.prepare import Prepared
from pretrain.training.zero_stage import trains_on_cpu

_USUAL_ON_GPU = 0.4  # share of a GPU's peak FLOP/s that training reaches
# Records that tell how fast a run is.
_RECENT = 20


def describe(prepared: Prepared, ranks: Ranks) -> str:
    """Everything a person would want to know before starting, as lines of text."""
    plan, recipe, data = prepared.plan, prepared.recipe, prepared.data
    per_token = plan.flops_per_sequence / plan.sequence_length
    memory = estimate_memory(recipe, prepared.ds_config, ranks.world_size, on_cpu=trains_on_cpu())
    stage = zero_stage(prepared.ds_config)
    seen = data.source.epochs(plan.batch.before(plan.steps))
    epochs = ", ".join(f"{name} {often:.2f} epochs" for name, often in seen.items())
    lines = [
        f"{recipe.name}: everything checked, nothing trained.",
        "",
        f"  steps            {plan.steps} (warm-up {plan.learning_rate.warmup}, decay {plan.learning_rate.decay})",
        f"  tokens           {plan.tokens / 1e6:,.1f}M, {plan.tokens_per_step:,} a step",
        f"  training FLOPs   {plan.training_flops:.4g}, {per_token:.4g} a token",
        f"  parameters       {plan.parameters['total_stored'] / 1e6:,.1f}M stored, "
        f"{plan.parameters['non_embedding_stored'] / 1e6:,.1f}M without embedding",
        f"  data             {epochs}",
        f"  tokenizer        {data.fingerprint[:16]}",
        f"  validation       every {plan.evaluate_every or plan.steps} steps on "
        f"{', '.join(part.source for part in data.validation) or 'nothing: the data has no validation split'}",
        *_suites(prepared),
        f"  checkpoints      every {plan.checkpoint_every or plan.steps} steps{_minutes(recipe)} in "
        f"{prepared.folder.checkpoints}",
        *_going_on(prepared, ranks),
        f"  ranks            {ranks.world_size}, {_batch(prepared, ranks)}",
        f"  precision        {recipe.precision}, activation checkpointing {recipe.activation_checkpointing}",
        f"  ZeRO stage       {stage}: {STAGES[stage]} ({prepared.stage.reason})",
        *(f"                   {line}" for line in prepared.stage.considered),
        *([f"                   {prepared.stage.warning}"] if prepared.stage.warning else []),
        *(f"                   {line}" for line in explain(prepared.ds_config["zero_optimization"], prepared.network)),
        f"  memory           about {size(memory.total)} a rank: weights {size(memory.weights)}, gradients "
        f"{size(memory.gradients)}, optimiser {size(memory.optimizer)}, and at most {size(memory.passes)} in the "
        f"passes of a micro-batch or {size(memory.update)} in an update",
        f"  time             {_time(prepared, ranks)}",
    ]
    lines += [f"  branch           {b.name}: leaves at step {b.start}, ends at {b.steps}" for b in plan.branches]
    return "\n".join([*lines, "", "DeepSpeed configuration:", json.dumps(prepared.ds_config, indent=2)])


def _time(prepared: Prepared, ranks: Ranks) -> str:
    """How long the rest of the run takes: at the speed that it has reached so far, else at a usual share of the
    device's peak.
    """
    folder, plan = prepared.folder, prepared.plan
    reached = (
        [record["flops_per_second"] for record in folder.metrics("train")] if folder.metrics_file.is_file() else []
    )
    peak = peak_flops(torch.device("cpu" if trains_on_cpu() else "cuda"))
    if reached:
        world_size = folder.environment()["world_size"]
        speed, basis = statistics.median(reached[-_RECENT:]) / world_size, f"the speed reached so far on {world_size}"
    elif peak is not None:
        speed, basis = _USUAL_ON_GPU * peak, f"{_USUAL_ON_GPU:.0%} of the vendor's peak"
    else:
        return "not known before the first steps on this device"
    done = folder.status().get("step", 0)
    seconds = plan.training_flops * (1 - done / plan.steps) / (speed * ranks.world_size)
    return (
        f"about {duration(seconds)}{' more' if done else ''} at {speed:.3g} FLOP/s a rank, {basis}; evaluation "
        "and checkpoints not counted"
    )


def _suites(prepared: Prepared) -> list[str]:
    suites, plan = prepared.recipe.evaluation.suites, prepared.plan
    if suites is None:
        return []
    return [f"  suites           every {plan.suites_every or plan.steps} steps: {', '.join(suites.names)}"]


def _going_on(prepared: Prepared, ranks: Ranks) -> list[str]:
    """The checkpoint that a start with this number of ranks resumes from, or why it cannot resume."""
    lines = []
    for _, name in sorted(list_checkpoints(prepared.folder.checkpoints), reverse=True):
        checkpoint = prepared.folder.checkpoints / name
        try:
            manifest = read_manifest(checkpoint)
        except (RunError, OSError) as error:
            lines.append(f"  passes over      {name}: {error}")
            continue
        describe = {"world_size": ranks.world_size, **prepared.shape}
        refusal = refuse_shape(checkpoint, manifest, describe, prepared.recipe.checkpoint)
        return [*lines, f"  goes on from     {name if refusal is None else f'nothing: {refusal}'}"]
    return lines


def _minutes(recipe: Recipe) -> str:
    minutes = recipe.checkpoint.every_minutes
    return "" if minutes is None else f" and at most {minutes:g} minutes apart"


def _batch(prepared: Prepared, ranks: Ranks) -> str:
    batch = prepared.recipe.batch
    accumulation = batch.sequences // (batch.micro_batch * ranks.world_size)
    return f"{batch.sequences} sequences a step = {batch.micro_batch} x {accumulation} x {ranks.world_size}"
