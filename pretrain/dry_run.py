"""`--dry-run`: what a run would be, from its checked recipe, without training it."""

from __future__ import annotations

import json
import time

import torch

from pretrain.ds_config import zero_stage
from pretrain.engine import peak_flops
from pretrain.environment import Ranks
from pretrain.memory import estimate_memory
from pretrain.memory import format_bytes as size
from pretrain.partitioning import STAGES, explain
from pretrain.run import Prepared
from pretrain.stage import trains_on_cpu
from pretrain.telemetry import format_seconds

# What training reaches of the promised FLOPs on a device, for an estimate of time before anything is measured.
_USUAL_UTILISATION = 0.4


def describe(prepared: Prepared, ranks: Ranks) -> str:
    """Everything a person would want to know before starting, as lines of text."""
    plan, recipe, data = prepared.plan, prepared.recipe, prepared.data
    per_token = plan.flops_per_sequence / plan.sequence_length
    memory = estimate_memory(recipe, prepared.config, prepared.ds_config, ranks.world_size, on_cpu=trains_on_cpu())
    rate = estimate_flops_per_second(prepared)
    seconds = plan.training_flops / (rate * ranks.world_size)
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
        f"  checkpoints      every {plan.checkpoint_every or plan.steps} steps in {prepared.folder.checkpoints}",
        f"  ranks            {ranks.world_size}, {_batch(prepared, ranks)}",
        f"  precision        {recipe.precision}, checkpointing {recipe.checkpointing}",
        f"  ZeRO stage       {stage}: {STAGES[stage]} ({prepared.stage.reason})",
        *(f"                   {line}" for line in prepared.stage.considered),
        *([f"                   {prepared.stage.warning}"] if prepared.stage.warning else []),
        *(f"                   {line}" for line in explain(prepared.ds_config["zero_optimization"], prepared.config)),
        f"  memory           about {size(memory.total)} a rank: weights {size(memory.weights)}, gradients "
        f"{size(memory.gradients)}, optimiser {size(memory.optimizer)}, and at most {size(memory.passes)} in the "
        f"passes of a micro-batch or {size(memory.update)} in an update",
        f"  time             about {format_seconds(seconds)} at {rate:.3g} FLOP/s a rank",
    ]
    lines += [f"  branch           {b.name}: leaves at step {b.start}, ends at {b.steps}" for b in plan.branches]
    return "\n".join([*lines, "", "DeepSpeed configuration:", json.dumps(prepared.ds_config, indent=2)])


def estimate_flops_per_second(prepared: Prepared) -> float:
    """FLOP/s of one rank: a usual share of the device's promise, or of what a matrix product reaches on a CPU now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device)
    if peak is not None:
        return _USUAL_UTILISATION * peak
    width = prepared.config.hidden_size
    kind = torch.float32 if prepared.recipe.precision == "fp32" else torch.bfloat16
    left = torch.ones(2048, width, dtype=kind, device=device)
    right = torch.ones(width, 4 * width, dtype=kind, device=device)
    left @ right
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3 or done < 3:
        left @ right
        done += 1
    return _USUAL_UTILISATION * done * 2 * 2048 * width * 4 * width / (time.perf_counter() - began)


def _suites(prepared: Prepared) -> list[str]:
    suites, plan = prepared.recipe.evaluation.suites, prepared.plan
    if suites is None:
        return []
    return [f"  suites           every {plan.suites_every or plan.steps} steps: {', '.join(suites.names)}"]


def _batch(prepared: Prepared, ranks: Ranks) -> str:
    batch = prepared.recipe.batch
    accumulation = batch.sequences // (batch.micro_batch * ranks.world_size)
    return f"{batch.sequences} sequences a step = {batch.micro_batch} x {accumulation} x {ranks.world_size}"
