"""One start of a training job on one rank: what outlives each of the runs it trains, a trunk and then its branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import StopRequest
from pretrain.ranks.watchdog import Watchdog


@dataclass(frozen=True)
class Session:
    """What every part of training shares.

    Attributes:
        device: this rank's.
        patience: seconds that anything but a step (start, evaluation, checkpoint) may take before the watchdog calls it
            a stall.
        profiled: first and last step to profile, counted from 1.
    """

    ranks: Ranks
    device: torch.device
    stop: StopRequest
    watchdog: Watchdog
    patience: float
    profiled: tuple[int, int] | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes records."""
        return self.ranks.rank == 0
