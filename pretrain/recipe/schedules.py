"""What changes from step to step as a pure function of the step number: learning rate, batch size, depth and
capacities.

Nothing here has state, so nothing of it needs a place in a checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from mor_model.curriculum import capacity_at, depth_at


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
        growing = self.sizes[:-1] or self.sizes
        # The first step of each size, and the one after the last.
        starts = [-(-place * self.warmup // len(growing)) for place in range(len(growing) + 1)]
        warm = sum(
            size * max(0, min(step, end) - begin)
            for size, (begin, end) in zip(growing, itertools.pairwise(starts), strict=True)
        )
        return warm + max(0, step - self.warmup) * self.full


@dataclass(frozen=True)
class Recursion:
    """Capacities and depth that the network uses at each update, see `mor_model.curriculum`.

    Attributes:
        capacities: planned share of the tokens at each recursion step, once nothing warms up any more.
        capacity_warmup: updates over which expert-choice capacities fall from 1 to them.
        depth_warmup: updates over which a depth that all tokens share grows from 1; routers decide after it.
    """

    capacities: tuple[float, ...]
    capacity_warmup: int = 0
    depth_warmup: int = 0

    @property
    def warmup(self) -> int:
        """Updates until every one costs the same."""
        return max(self.capacity_warmup, self.depth_warmup)

    def capacities_at(self, step: int) -> tuple[float, ...] | None:
        """Capacities of update number `step` (from 0); None where they are the network's own."""
        return capacity_at(step, self.capacity_warmup, self.capacities) if step < self.capacity_warmup else None

    def depth_at(self, step: int) -> int | None:
        """Recursion steps that every token takes at update number `step` (from 0); None where routers decide."""
        return depth_at(step, self.depth_warmup, len(self.capacities)) if step < self.depth_warmup else None

    def active_at(self, step: int) -> tuple[float, ...]:
        """Planned share of the tokens at each recursion step of update number `step` (from 0)."""
        depth = self.depth_at(step)
        if depth is not None:
            return tuple(float(place < depth) for place in range(len(self.capacities)))
        return self.capacities_at(step) or self.capacities
