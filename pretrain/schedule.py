"""What changes from step to step as a pure function of the step number: learning rate, batch size, routing capacities.

Nothing here has state, so nothing of it needs a place in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def linear_decay(x: float) -> float:
    """1 at x=0, 0 at x=1."""
    return 1.0 - x


def sqrt_decay(x: float) -> float:
    """1 - sqrt(x) (Haegele et al. 2024, arXiv 2405.18392, section 3): falls fast first, then slowly."""
    return 1.0 - math.sqrt(x)


DECAY_SHAPES: dict[str, Callable[[float], float]] = {"linear": linear_decay, "1-sqrt": sqrt_decay}


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step as a share of its peak.

    Attributes:
        kind: `wsd`, `cosine`, `linear` or `constant`.
        steps: length of the run; warmup: steps of linear rise; decay: steps of the final fall (`wsd` only).
        decay_shape: key of `DECAY_SHAPES`; floor: share of the peak that the fall ends at.
    """

    kind: str
    steps: int
    warmup: int = 0
    decay: int = 0
    decay_shape: str = "linear"
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """Share of the peak at update number `step` (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.steps - self.decay if self.kind == "wsd" else self.warmup
        if self.kind == "constant" or step < start:
            return 1.0
        x = min(1.0, (step - start) / max(1, self.steps - start))
        if self.kind == "cosine":
            fall = 0.5 * (1.0 + math.cos(math.pi * x))
        else:
            fall = DECAY_SHAPES[self.decay_shape if self.kind == "wsd" else "linear"](x)
        return self.floor + (1.0 - self.floor) * fall


@dataclass(frozen=True)
class BatchSize:
    """Global batch of every step: doubles from `start` to `full`, each size lasting equally long over `warmup`
    steps.
    """

    full: int
    start: int
    warmup: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that occurs, ascending."""
        sizes = [self.full]
        while self.warmup and sizes[-1] > self.start:
            sizes.append(sizes[-1] // 2)
        return tuple(reversed(sizes))

    def at(self, step: int) -> int:
        """Sequences of update number `step` (from 0)."""
        if step >= self.warmup:
            return self.full
        growing = self.sizes[:-1] or self.sizes
        return growing[step * len(growing) // self.warmup]

    def before(self, step: int) -> int:
        """Sequences of all updates before number `step`."""
        warm = sum(self.at(n) for n in range(min(step, self.warmup)))
        return warm + max(0, step - self.warmup) * self.full


@dataclass(frozen=True)
class Capacities:
    """Expert-choice capacities of every step: from 1 to `final` along half a cosine over `warmup` steps.

    Source: the capacity warm-up of Bae et al. 2025 (arXiv 2507.10524), appendix on routing.
    """

    final: tuple[float, ...]
    warmup: int

    def at(self, step: int) -> tuple[float, ...]:
        """Capacity of every recursion step at update number `step` (from 0)."""
        if step >= self.warmup:
            return self.final
        left = 0.5 * (1.0 + math.cos(math.pi * step / self.warmup))
        return tuple(final + (1.0 - final) * left for final in self.final)
