"""`--dry-run`: what a run would be, from its checked recipe, without training it."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass

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

# What training reaches of a GPU's promised FLOPs, and of a matrix product's on a CPU.
_USUAL_ON_GPU, _USUAL_ON_CPU = 0.4, 0.75
_MEASURING_SECONDS = 0.3
# Records that tell how fast a run is.
_RECENT = 20


def describe(prepared: Prepared, ranks: Ranks) -> str:
    """Everything a person would want to know before starting, as lines of text."""
    plan, recipe, data = prepared.plan, prepared.recipe, prepared.data
    per_token = plan.flops_per_sequence / plan.sequence_length
    memory = estimate_memory(recipe, prepared.config, prepared.ds_config, ranks.world_size, on_cpu=trains_on_cpu())
    speed = estimate_speed(prepared)
    done = prepared.folder.status().get("step", 0)
    seconds = plan.training_flops * (1 - done / plan.steps) / (speed.flops_per_second * ranks.world_size)
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
        *(f"                   {line}" for line in explain(prepared.ds_config["zero_optimization"], prepared.config)),
        f"  memory           about {size(memory.total)} a rank: weights {size(memory.weights)}, gradients "
        f"{size(memory.gradients)}, optimiser {size(memory.optimizer)}, and at most {size(memory.passes)} in the "
        f"passes of a micro-batch or {size(memory.update)} in an update",
        f"  time             about {duration(seconds)}{' more' if done else ''} at "
        f"{speed.flops_per_second:.3g} FLOP/s a rank, {speed.basis}; evaluation and checkpoints not counted",
    ]
    lines += [f"  branch           {b.name}: leaves at step {b.start}, ends at {b.steps}" for b in plan.branches]
    return "\n".join([*lines, "", "DeepSpeed configuration:", json.dumps(prepared.ds_config, indent=2)])


@dataclass(frozen=True)
class Speed:
    """What one rank is thought to compute, and what that rests upon."""

    flops_per_second: float
    basis: str


def estimate_speed(prepared: Prepared) -> Speed:
    """What the run itself has reached, where it has begun; else a usual share of what the device's vendor promises; on
    a CPU, of what this process reaches in a matrix product as large as the network's, alone on the machine.
    """
    folder = prepared.folder
    reached = (
        [record["flops_per_second"] for record in folder.metrics("train")] if folder.metrics_file.is_file() else []
    )
    if reached:
        world_size = folder.environment()["world_size"]
        return Speed(statistics.median(reached[-_RECENT:]) / world_size, f"as it reached so far on {world_size}")
    device = torch.device("cpu" if trains_on_cpu() else "cuda")
    peak = peak_flops(device)
    if peak is not None:
        return Speed(_USUAL_ON_GPU * peak, f"{_USUAL_ON_GPU:.0%} of what its vendor promises")
    rate = _USUAL_ON_CPU * _matrix_product_flops_per_second(prepared, device)
    return Speed(rate, f"{_USUAL_ON_CPU:.0%} of what a matrix product reaches here")


def _matrix_product_flops_per_second(prepared: Prepared, device: torch.device) -> float:
    """Of the first product of a feed-forward layer, on the tokens of a micro-batch, at most 2048."""
    batch, config = prepared.recipe.batch, prepared.config
    tokens = min(2048, batch.micro_batch * batch.sequence_length)
    kind = torch.float32 if prepared.recipe.precision == "fp32" else torch.bfloat16
    left = torch.ones(tokens, config.hidden_size, dtype=kind, device=device)
    right = torch.ones(config.hidden_size, 2 * config.intermediate_size, dtype=kind, device=device)
    flops = 2 * tokens * right.numel()
    left @ right
    fastest, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < _MEASURING_SECONDS or fastest == math.inf:
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return flops / fastest


def _suites(prepared: Prepared) -> list[str]:
    suites, plan = prepared.recipe.evaluation.suites, prepared.plan
    if suites is None:
        return []
    return [f"  suites           every {plan.suites_every or plan.steps} steps: {', '.join(suites.names)}"]


def _going_on(prepared: Prepared, ranks: Ranks) -> list[str]:
    """What a start with so many ranks would go on from, or why it could not."""
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
