"""Ranks as threads of one process, and the collectives of objects between them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

T = TypeVar("T")


class Threads:
    """`each(action)` calls `action(rank)` in as many threads at once; inside, torch's collectives of objects work."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._world_size = world_size
        self._mine = threading.local()
        self._turn = threading.Barrier(world_size)
        self._board: list[Any] = [None] * world_size
        monkeypatch.setattr(dist, "all_gather_object", self._all_gather)
        monkeypatch.setattr(dist, "broadcast_object_list", self._broadcast)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)

    @property
    def rank(self) -> int:
        """Of the thread that asks."""
        return self._mine.rank

    def each(self, action: Callable[[int], T]) -> list[T | BaseException]:
        """What each rank returned or raised."""

        def run(rank: int) -> T | BaseException:
            self._mine.rank = rank
            try:
                return action(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self._world_size) as pool:
            return list(pool.map(run, range(self._world_size)))

    def _all_gather(self, everyone: list[Any], mine: Any) -> None:
        self._board[self.rank] = copy.deepcopy(mine)
        self._turn.wait(60)
        everyone[:] = copy.deepcopy(self._board)
        self._turn.wait(60)

    def _broadcast(self, values: list[Any], src: int) -> None:
        everyone: list[Any] = [None] * self._world_size
        self._all_gather(everyone, values)
        values[:] = everyone[src]
