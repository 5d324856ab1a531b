"""`--dry-run`: what a run would be, from its checked recipe, without training it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch

from mor_model import RecursiveTransformer
from mor_model.flops import count_parameters
from pretrain.ds_config import offload_device, zero_stage
from pretrain.engine import peak_flops
from pretrain.environment import Ranks
from pretrain.run import Prepared
from pretrain.telemetry import format_seconds

# What training reaches of the promised FLOPs on a device, for an estimate of time before anything is measured.
_USUAL_UTILISATION = 0.4
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_autocast": 4}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one rank's device: weights, gradients, optimiser (master weights and moments), activations."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def describe(prepared: Prepared, ranks: Ranks) -> str:
    """Everything a person would want to know before starting, as lines of text."""
    plan, recipe, data = prepared.plan, prepared.recipe, prepared.data
    per_token = plan.flops_per_sequence / plan.sequence_length
    memory = estimate_memory(prepared, ranks.world_size)
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
        f"  checkpoints      every {plan.checkpoint_every or plan.steps} steps in {prepared.folder.checkpoints}",
        f"  ranks            {ranks.world_size}, {_batch(prepared, ranks)}",
        f"  precision        {recipe.precision}, checkpointing {recipe.checkpointing}",
        f"  ZeRO stage       {stage}: {_reason(stage)}",
        f"  memory           about {_size(memory.total)} a rank: weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, optimiser {_size(memory.optimizer)}, activations {_size(memory.activations)}",
        f"  time             about {format_seconds(seconds)} at {rate:.3g} FLOP/s a rank",
    ]
    lines += [f"  branch           {b.name}: leaves at step {b.start}, ends at {b.steps}" for b in plan.branches]
    return "\n".join([*lines, "", "DeepSpeed configuration:", json.dumps(prepared.ds_config, indent=2)])


def estimate_memory(prepared: Prepared, world_size: int) -> Memory:
    """Bytes that training needs on the device of one rank (Rajbhandari et al. 2020, arXiv 1910.02054, section 3).

    Activations are counted by running the forward pass of one micro-batch without memory behind its tensors.
    """
    count = count_parameters(prepared.config).total_stored
    stage = zero_stage(prepared.ds_config)
    precision = prepared.recipe.precision

    def shard(size: int, since_stage: int) -> int:
        return size // world_size if stage >= since_stage else size

    width = _BYTES[precision]
    accumulation = (prepared.ds_config.get("data_types") or {}).get("grad_accum_dtype")
    gradient_width = 4 if accumulation == "fp32" or width == 4 else 2
    # ZeRO keeps fp32 master weights beside the weights, also when those are fp32 themselves.
    optimizer = shard(count * (12 if stage else 8), 1)
    if offload_device(prepared.ds_config, "offload_optimizer") != "none":
        optimizer = 0
    weights = shard(count * width, 3)
    if offload_device(prepared.ds_config, "offload_param") != "none":
        weights = 0
    return Memory(weights, shard(count * gradient_width, 2), optimizer, _activations(prepared))


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


def _activations(prepared: Prepared) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe, config = prepared.recipe, prepared.config
    batch, length = recipe.batch.micro_batch, recipe.batch.sequence_length
    kind = {"fp32": torch.float32, "fp16": torch.float16}.get(recipe.precision, torch.bfloat16)

    def saved(checkpointing: str) -> int:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            return count(checkpointing)
        finally:
            torch.set_default_dtype(usual)

    def count(checkpointing: str) -> int:
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with FakeTensorMode():
            model = RecursiveTransformer(config, checkpointing=checkpointing)  # type: ignore[arg-type]
            own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            tokens = torch.zeros(batch, length, dtype=torch.long)
            documents = torch.zeros_like(tokens) if config.document_masking else None
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(tokens, tokens, documents_BT=documents)
        return sum(storage.nbytes() for cdata, storage in seen.items() if cdata not in own)

    kept = saved(recipe.checkpointing)
    if recipe.checkpointing == "none":
        return kept
    # While one checkpointed part is computed again, its own activations are there too.
    whole = saved("none")
    applications = len(config.schedule.applications)
    parts = len(config.schedule.steps[0]) if recipe.checkpointing == "recursion" else 1
    return kept + whole * parts // applications


def _batch(prepared: Prepared, ranks: Ranks) -> str:
    batch = prepared.recipe.batch
    accumulation = batch.sequences // (batch.micro_batch * ranks.world_size)
    return f"{batch.sequences} sequences a step = {batch.micro_batch} x {accumulation} x {ranks.world_size}"


def _reason(stage: int) -> str:
    return {
        0: "every rank holds everything",
        1: "optimiser states are partitioned",
        2: "optimiser states and gradients are partitioned",
        3: "weights, gradients and optimiser states are partitioned",
    }[stage]


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
