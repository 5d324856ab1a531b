"""The optimiser: which parameters decay, at which learning rate, with which kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pretrain.sections import Optim


def parameter_groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optim: Optim) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors (norm scales, biases), which do not.

    Every group's `lr` is its peak; the loop multiplies it by the schedule's factor each step. A parameter that several
    modules share counts once.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    seen: set[int] = set()
    for _, parameter in named_parameters:
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        # Under ZeRO-3 a partitioned parameter is empty; its own shape is kept beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay, "lr": optim.lr},
        {"params": vectors, "weight_decay": 0.0, "lr": optim.lr},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optim: Optim, *, offloaded: bool
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`: torch's fused kernel, or DeepSpeed's CPU kernel where optimiser states are
    offloaded.
    """
    groups = parameter_groups(named_parameters, optim)
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    # Passing the op's own AdamW in the JSON would compile a kernel for over a minute; torch's needs no build.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
