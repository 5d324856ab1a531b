"""Which piece comes next, for whom. The order changes nothing about the result, only how much is read twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_prep.sources.base import Group
from data_prep.tokenizing.receipts import Receipt

Key = tuple[int, int]  # group, piece
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Share:
    """Task `index` of `count`: which pieces are this task's. Even for files whose number of pieces nobody knows yet."""

    index: int = 0
    count: int = 1
    _starts: list[float] = field(default_factory=list)

    def prepare(self, groups: Iterable[Group]) -> None:
        """Lay all groups along a line by their size; a task has one stretch of it."""
        at = 0.0
        self._starts = [at := at + max(group.bytes, 1) for group in groups]
        self._starts.insert(0, 0.0)

    def owner(self, key: Key) -> int:
        """The task that a piece belongs to: pieces of a file fall evenly on its tasks, by multiples of the golden
        ratio.
        """
        group, piece = key
        tasks = self.tasks_on(group)
        return tasks[int((piece * _GOLDEN) % 1.0 * len(tasks))]

    def tasks_on(self, group: int) -> range:
        """The tasks that share a group: those with more than half of their stretch on it; for a group shorter than a
        stretch the one in whose stretch its middle lies.

        They share it evenly. A task with a sliver of a file would have to look for its first piece far behind the end.
        """
        low, high = (self._starts[group + n] / self._starts[-1] * self.count for n in (0, 1))
        if high - low < 1:
            middle = min(int((low + high) / 2), self.count - 1)
            return range(middle, middle + 1)
        return range(int(low + 0.5), min(int(high + 0.5), self.count))

    def mine(self, key: Key) -> bool:
        """Whether this task does the piece."""
        return self.count == 1 or self.owner(key) == self.index


class Schedule:
    """Hands out pieces and knows when all are done.

    A worker stays with the file it has open; then unbegun files are handed out, then help is sent to the busy ones.
    """

    def __init__(self, groups: tuple[Group, ...], share: Share, max_tokens: int = 0) -> None:
        self.groups, self.share, self.max_tokens = groups, share, max_tokens
        share.prepare(groups)
        self.receipts: dict[Key, Receipt] = {}
        self.running: dict[Key, object] = {}
        self.returned: list[Key] = []  # pieces whose worker was lost
        self._next = [0] * len(groups)
        self._ends: list[int | None] = [group.pieces for group in groups]
        self._current: dict[object, int] = {}
        # Groups in which this share may have something left to begin. What leaves the list never comes back: pieces of
        # lost workers go through `returned`. So asking costs the same for ten groups and for a hundred thousand.
        self._unfinished = [number for number in range(len(groups)) if share.index in share.tasks_on(number)]
        self._ordered: list[Receipt] = []  # see in_order()
        self._ordered_tokens = 0
        self._at: Key = (0, 0)  # the piece behind the last of them
        self._full = False

    def add(self, receipt: Receipt) -> None:
        """A piece is finished, or finished anew."""
        key = (receipt.group, receipt.piece)
        if key in self.receipts:
            self._ordered, self._ordered_tokens, self._at, self._full = [], 0, (0, 0), False
        self.receipts[key] = receipt
        self.running.pop(key, None)
        if receipt.last:
            end = self._ends[receipt.group]
            self._ends[receipt.group] = receipt.piece + 1 if end is None else min(end, receipt.piece + 1)

    def give_back(self, key: Key) -> None:
        """A piece failed on its worker; another one tries it."""
        self.running.pop(key, None)
        self.returned.append(key)

    def lost(self, worker: object) -> list[Key]:
        """`worker` died; its piece is handed out again."""
        keys = [key for key, owner in self.running.items() if owner == worker]
        for key in keys:
            del self.running[key]
            self.returned.append(key)
        self._current.pop(worker, None)
        return keys

    def take(self, worker: object) -> Key | None:
        """The next piece for `worker`; None when there is nothing to hand out now."""
        key = self._choose(worker)
        if key is not None:
            self.running[key] = worker
            self._current[worker] = key[0]
        return key

    def _choose(self, worker: object) -> Key | None:
        while self.returned:
            again = self.returned.pop(0)
            end = self._ends[again[0]]
            if (end is None or again[1] < end) and again not in self.receipts:
                return again
        if self._enough():
            return None
        current = self._current.get(worker)
        if current is not None and (key := self._peek(current)) is not None:
            return key
        busy = set(self._current.values())
        waiting: list[Key] = []
        for key in self._waiting():
            if key[0] not in busy:
                return key
            waiting.append(key)
        # Help where the most is left to do, as far as sizes tell.
        return max(waiting, key=lambda k: self.groups[k[0]].bytes, default=None)

    def _waiting(self) -> Iterator[Key]:
        """The first piece to begin of each group that has one; groups that have none are not looked at again."""
        kept: list[int] = []
        looked = 0
        try:
            for group in self._unfinished:
                looked += 1
                if (key := self._peek(group)) is not None:
                    kept.append(group)
                    yield key
        finally:
            self._unfinished[:looked] = kept

    def _peek(self, group: int) -> Key | None:
        """The first piece of a group that this share has still to begin; of a file of unknown length there always is
        one.
        """
        end = self._ends[group]
        piece = self._next[group]
        leading = True  # this share has nothing left to do before `piece`
        while end is None or piece < end:
            key = (group, piece)
            if self.share.mine(key) and key not in self.receipts:
                if key not in self.running:
                    return key
                leading = False
            piece += 1
            if leading:
                self._next[group] = piece
        return None

    def _enough(self) -> bool:
        if not self.max_tokens:
            return False
        self._order()
        return self._full

    def overflow(self) -> tuple[Key, int] | None:
        """The piece in which the maximum of tokens is passed, and how many training tokens it may hold."""
        left = self.max_tokens
        for receipt in self.in_order():
            if left and receipt.train_tokens > left:
                return (receipt.group, receipt.piece), left
            left -= receipt.train_tokens
        return None

    def in_order(self) -> list[Receipt]:
        """Receipts in the order of the data set: up to the first piece that is missing, or that fills the maximum."""
        self._order()
        return list(self._ordered)

    def _order(self) -> None:
        group, piece = self._at
        while group < len(self.groups) and not self._full:
            end = self._ends[group]
            if end is not None and piece >= end:
                group, piece = group + 1, 0
                continue
            receipt = self.receipts.get((group, piece))
            if receipt is None:
                break
            self._ordered.append(receipt)
            self._ordered_tokens += receipt.train_tokens
            self._full = receipt.capped or bool(self.max_tokens and self._ordered_tokens >= self.max_tokens)
            piece += 1
        self._at = (group, piece)

    @property
    def complete(self) -> bool:
        """Whether every piece of this share is finished."""
        if self._enough():
            return not self.running
        return not self.running and not self.returned and next(self._waiting(), None) is None
