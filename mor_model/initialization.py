"""Initial weights: a pure function of the seed and a parameter's name.

Normal with `init_std` everywhere, and the two projections that write into the residual stream divided by sqrt(2 L), L
being the effective depth. Dividing by the root of the number of writes is GPT-2's (Radford et al. 2019, section 2.3);
that a shared layer counts once per application is Geiping et al.'s for recurrent depth (2025, arXiv 2502.05171, section
on initialisation), because the sum of all writes must not grow. Norm weights are one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from mor_model.config import ModelConfig

RESIDUAL_WRITERS = ("attention.output.weight", "feed_forward.down.weight")
Gathered = Callable[[nn.Parameter], AbstractContextManager[object]]


def whole(_: nn.Parameter) -> AbstractContextManager[object]:
    return nullcontext()


def initialize(model: nn.Module, config: ModelConfig, seed: int, gathered: Gathered = whole) -> None:
    """Fill every parameter in place.

    Each parameter has its own generator on the CPU, seeded by (seed, name): neither the order of parameters nor the
    device, the ZeRO stage or the number of processes changes a value.

    Args:
        model: the network. seed: any integer.
        gathered: context in which a parameter is whole and may be written; for a partitioned model
            `lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0)`.
    """
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        with gathered(parameter), torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.normal_(
                0.0, residual_std if name.endswith(RESIDUAL_WRITERS) else config.init_std, generator=generator
            )
            parameter.copy_(values)
