"""The DeepSpeed engine of a run: process group, network, optimiser, in the order that ZeRO requires.

What is known about DeepSpeed's corners is kept here and in `pretrain.checkpoints.store`, so that the loop reads like
training.
"""

from __future__ import annotations

import datetime
import logging
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.ranks.environment import Ranks
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schedules import LearningRate
from pretrain.training.muon import Muon
from pretrain.training.optimizer import Scheduler, build_optimizer

_SHM_COMM = "deepspeed_shm_comm"
# Without sparsity, from NVIDIA's data sheets; the first whose words are all in the device's name counts.
_PEAK_DENSE_BF16 = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def start_process_group(ranks: Ranks, timeout_seconds: float) -> torch.device:
    """Join the process group and return this rank's device. Every collective that waits longer than the limit
    raises.

    Raises:
        MeetingError: the ranks do not find one another.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from pretrain.ranks.rendezvous import METHOD

    # DeepSpeed reports every file it touches, and torch warns of names that DeepSpeed still uses.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        _skip_shared_memory_build()
    else:
        accelerator.set_device(ranks.device)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            init_method=METHOD,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    return torch.device(accelerator.device_name(ranks.device) if accelerator.device_name() != "cpu" else "cpu")


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 where the device computes in it, else fp32; anything else stays."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def build_engine(
    recipe: Recipe, ds_config: dict[str, Any], rate: LearningRate, weights: str | None
) -> tuple[Any, Scheduler]:
    """Network, optimiser with its learning-rate scheduler, and DeepSpeed around them; the same on every rank.

    Args:
        recipe: with its precision resolved.
        ds_config: what `resolve_ds_config` returned.
        rate: the plan's.
        weights: folder of weights to start from; None initialises new ones.

    Returns:
        deepspeed.DeepSpeedEngine, and the scheduler of its optimiser.
    """
    import deepspeed
    from deepspeed.utils import groups

    from mor_model import RecursiveTransformer
    from mor_model.initialization import whole
    from mor_model.weights import start_from
    from pretrain.recipe.deepspeed_json import offload_device, zero_stage

    if ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) > 1:
        # DeepSpeed makes this group once per process; a branch's engine comes after the trunk's.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if zero_stage(ds_config) == 3:
        # Partitioned as it is built and filled one parameter at a time: no rank ever holds the whole network.
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            model = RecursiveTransformer(recipe.network, activation_checkpointing=recipe.activation_checkpointing)
        gathered = lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0)  # noqa: E731
    else:
        model = RecursiveTransformer(recipe.network, activation_checkpointing=recipe.activation_checkpointing)
        gathered = whole
    if weights is None:
        model.initialize(recipe.seed, gathered)
    else:
        start_from(model, weights, gathered)
    # A shared layer's weights are cast once and remembered under autocast, but cast each time when a selective
    # checkpoint computes again, and torch demands the same operators both times.
    torch.set_autocast_cache_enabled(recipe.activation_checkpointing != "selective")
    offloaded = offload_device(ds_config, "offload_optimizer") != "none"
    optimizer = build_optimizer(model, recipe.optim, offloaded=offloaded)
    scheduler = Scheduler(optimizer, rate)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if isinstance(optimizer, Muon):
        optimizer.attach(engine)
    if recipe.compile:
        engine.compile()
    scheduler.follow(engine.optimizer)
    return engine, scheduler


def update(engine: Any) -> tuple[bool, float]:
    """One optimiser step. Every rank leaves it out when a gradient is not finite.

    Returns:
        Whether the weights were updated, and the global norm of the gradients before clipping.
    """
    if engine.zero_optimization():
        engine.step()
        return not engine.optimizer.overflow, float(engine.get_global_grad_norm() or 0.0)
    # Stage 0 has no check of its own. Gradients are already summed, so every rank sees the same ones.
    parameters = list(engine.module.parameters())
    for parameter in parameters:
        # What took no part (while depth warms up) has a gradient of zero under the other stages.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if not torch.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
        return False, float(norm)
    engine.step()
    return True, float(norm)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator for one step on one rank.

    Randomness is a function of the step, so a resumed run draws what the undisturbed one drew without storing
    generators.
    """
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed % (1 << 63))
    np.random.seed(mixed % (1 << 32))
    random.seed(mixed)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak dense bf16 FLOP/s from its data sheet; None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device)))
    return next((peak for model, peak in _PEAK_DENSE_BF16.items() if words.issuperset(model.split())), None)


def _skip_shared_memory_build() -> None:
    """Leave out DeepSpeed's shared-memory collectives where they are not built yet: building takes half a minute."""
    import deepspeed.ops

    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    built = folder is not None and next(Path(folder).glob(f"**/{_SHM_COMM}.so"), None) is not None
    if not built:
        deepspeed.ops.__compatible_ops__[_SHM_COMM] = False


def _cpu_computes_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None) or getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe is not None and probe())
