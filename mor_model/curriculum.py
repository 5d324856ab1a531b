"""What changes over a run, as pure functions of the step; the values are arguments of the network's forward pass."""

from __future__ import annotations

import math

from mor_model.errors import ConfigError


def capacity_at(step: int, length: int, capacities: tuple[float, ...]) -> tuple[float, ...]:
    """Capacities at an optimiser step of a warm-up along a half cosine from 1 (paper, appendix on capacity warm-up).

    Args:
        step: 0-based optimiser step. length: steps until the final values hold; 0 is no warm-up.
        capacities: final share of the sequence of each recursion step.

    Raises:
        ConfigError: for a negative step or length.
    """
    if step < 0 or length < 0:
        raise ConfigError(f"capacity warm-up: step ({step}) and length ({length}) must not be negative.")
    if step >= length:
        return capacities
    remaining = 0.5 * (1.0 + math.cos(math.pi * step / length))
    return tuple(capacity + (1.0 - capacity) * remaining for capacity in capacities)


def depth_at(step: int, length: int, recursions: int) -> int:
    """Recursion steps that every token takes at an optimiser step, when depth grows from 1 to R in equal stages.

    Args:
        step: 0-based optimiser step. length: steps until full depth; 0 is full depth from the start. recursions: R.

    Raises:
        ConfigError: for a negative step or length.
    """
    if step < 0 or length < 0:
        raise ConfigError(f"depth curriculum: step ({step}) and length ({length}) must not be negative.")
    if step >= length:
        return recursions
    return 1 + step * (recursions - 1) // length
