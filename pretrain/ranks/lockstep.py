"""Ranks that evaluate together continue, stop and skip a failed evaluation together.

Under ZeRO-3 a forward pass is a collective: if one rank left alone, the others would wait for ever. So before every
pass the ranks exchange, in one small all-reduce, whether one of them was asked to stop or has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.ranks.agreement import gather
from pretrain.ranks.signals import Asked, Request

_Result = TypeVar("_Result")


class BrokenOff(Exception):
    """An evaluation ended early on all ranks alike, because one of them was asked to stop. Attributes: asked."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(f"rank {asked.rank} was asked to stop")
        self.asked = asked


class EvaluationFailed(Exception):
    """An evaluation failed on a rank, and all ranks have left it; the message names the rank and the error."""


class Lockstep:
    """Where the ranks of one evaluation meet. Without `poll` they do not, and nothing breaks off.

    Args:
        poll: what this rank was asked to do.
        device: of tensors in collectives; moved: called before every meeting.
    """

    def __init__(
        self,
        poll: Callable[[], Request] | None = None,
        device: torch.device | None = None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._poll, self._device, self._moved = poll, device, moved
        self._computing = False

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Around forward passes and the collectives that add them up. An error in here ends the job, because the other
        ranks already wait for this one.
        """
        self._computing = True
        yield
        self._computing = False

    def meet(self) -> None:
        """Before a forward pass. Collective.

        Raises:
            BrokenOff: on all ranks alike; EvaluationFailed: on all ranks alike.
        """
        if self._poll is None:
            return
        asked = self._agree(None)
        if asked.request.stops:
            raise BrokenOff(asked)

    def run(self, action: Callable[[], _Result]) -> _Result:
        """What `action` returns. Collective; outside of `passes` it may fail on any rank.

        Raises:
            BrokenOff, EvaluationFailed: on all ranks alike. Other errors: from within `passes`.
        """
        self._computing = False
        try:
            result = action()
        except (BrokenOff, EvaluationFailed):
            raise
        except Exception as error:
            if self._computing:
                raise
            self._agree(error)
            raise AssertionError("_agree raises when a rank has an error") from error
        self._agree(None)  # another rank may have failed after its last pass
        return result

    def _agree(self, error: Exception | None) -> Asked:
        """What the ranks are asked to do.

        Raises:
            EvaluationFailed: on all ranks alike, when any of them has an error.
        """
        self._moved()
        mine = Request.NONE if self._poll is None else self._poll()
        world = dist.get_world_size()
        each = torch.zeros(2, world, device=self._device)  # a column for every rank
        each[0, dist.get_rank()] = float(mine)
        each[1, dist.get_rank()] = float(error is not None)
        if world > 1:
            dist.all_reduce(each)
        requests, failed = each.tolist()
        if any(failed):
            reasons = gather(None if error is None else f"{type(error).__name__}: {error}")
            rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise EvaluationFailed(f"rank {rank}: {reasons[rank]}")
        return Asked.strongest(requests)
