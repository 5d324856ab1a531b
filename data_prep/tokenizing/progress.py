"""How far the work is: a bar at a terminal, elsewhere a line a minute."""

from __future__ import annotations

import time
from contextlib import closing

from data_prep.sources.base import SourceError
from data_prep.sources.streams import ByteStream, compression
from data_prep.terminal import ProgressBars, duration
from data_prep.tokenizing.piece import Progress as Step
from data_prep.tokenizing.piece_schedule import Key, Schedule
from data_prep.tokenizing.shard_plan import Plan

_INTERVAL = 60.0  # seconds between two lines where there is no terminal
_LOOK = 8 << 20  # bytes read of a compressed file to see how far it expands


class Estimate:
    """Which share of the work is done, in bytes of decompressed input: the one measure that is known beforehand.

    Finished pieces count as what was planned for them. Of pieces under way only the text is known; it stands for as
    much input as the text of the finished ones did.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        self._schedule, self._max_tokens = schedule, plan.settings.max_tokens
        ratios: dict[str, float] = {}
        self._sizes: list[float] = []
        for group in plan.groups:
            if group.source not in ratios and group.files:
                ratios[group.source] = expansion(group.files[0])
            # The size of a hub data set is not known: its files count as one piece each.
            self._sizes.append(group.bytes * ratios.get(group.source, 1.0) or group.piece_bytes)
        self._total = max(1.0, sum(self._sizes) / schedule.share.count)
        self._count()
        self._before = self._text

    def share(self, text_bytes: int) -> float:
        """Between 0 and 1. text_bytes: text encoded since this object was made."""
        if len(self._schedule.receipts) != self._counted:
            self._count()
        under_way = max(0.0, text_bytes - (self._text - self._before))
        done = (self._read + under_way * (self._read / self._text if self._text else 1.0)) / self._total
        if self._max_tokens:
            done = max(done, self._tokens / self._max_tokens)
        return min(1.0, done)

    def _count(self) -> None:
        """Add up what the finished pieces are."""
        self._read = self._text = self._tokens = 0.0
        own = [receipt for key, receipt in self._schedule.receipts.items() if self._schedule.share.mine(key)]
        for receipt in own:
            group, size = self._schedule.groups[receipt.group], self._sizes[receipt.group]
            if group.pieces is not None:
                self._read += size / max(1, group.pieces)
            else:
                rest = max(0.0, size - receipt.piece * group.piece_bytes)
                self._read += rest if receipt.last else min(rest, group.piece_bytes)
            self._tokens += receipt.train_tokens
            self._text += sum(shard.text_bytes for shards in receipt.shards.values() for shard in shards)
        self._counted = len(self._schedule.receipts)


def expansion(path: str) -> float:
    """Decompressed bytes for a byte of the file, by its first megabytes; 1 where it is not compressed or unreadable."""
    if not compression(path):
        return 1.0
    try:
        with closing(ByteStream(path)) as stream:
            stream.head(_LOOK)
            return stream.offset / max(1, stream.consumed)
    except SourceError:
        return 1.0


class Display:
    """Bytes, documents, tokens a second, the time left, and the piece each worker is at."""

    def __init__(self) -> None:
        self._bars = ProgressBars()
        self._plan: Plan | None = None
        self._schedule: Schedule | None = None
        self._tokens = self._documents = self._bytes = 0
        self._began = self._told = time.monotonic()
        self._estimate: Estimate | None = None
        self._estimated_from = 0  # bytes when the estimate was made
        self._first_line: tuple[float, float] | None = None  # when, and the share that was done
        self._workers: dict[int, str] = {}

    def say(self, message: str) -> None:
        """Print one line."""
        self._bars.say(message)

    def begin(self, plan: Plan, schedule: Schedule) -> None:
        """Show the bar (at a terminal only)."""
        self._plan, self._schedule = plan, schedule
        if own := sum(schedule.share.mine(key) for key in schedule.receipts):
            self.say(f"continuing: {own} finished piece(s) found.")
        if self._bars.on_terminal:
            self._bars.update(self._bars.add("", 1.0), self._share(), "starting")

    def progress(self, worker: int, key: Key, step: Step) -> None:
        """Count a batch."""
        self._tokens += step.tokens
        self._documents += step.documents
        self._bytes += step.text_bytes
        if self._plan is None:
            return
        now = time.monotonic()
        self._workers[worker] = f"{worker}:{self._plan.groups[key[0]].source}/{key[1]}"
        if not self._bars.on_terminal and now - self._told < _INTERVAL:
            return
        done, seconds = self._share(), max(now - self._began, 1e-9)
        what = (
            f"{self._bytes / 1e6:,.0f} MB  {self._documents:,} documents  {self._tokens / seconds:,.0f} tokens/s  "
            + " ".join(text for _, text in sorted(self._workers.items())[:8])
        )
        self._bars.update(0, done, what)
        if not self._bars.on_terminal:
            self._told = now
            then, before = self._first_line = self._first_line or (now, done)
            left = f"  {duration((1 - done) * (now - then) / (done - before))} left" if done > before else ""
            self.say(f"{done:.1%}  {what}{left}")

    def _share(self) -> float:
        """Which share of all is done. The estimate is made when it is first asked for, since it looks into files."""
        if self._estimate is None:
            assert self._plan is not None and self._schedule is not None
            self._estimate, self._estimated_from = Estimate(self._plan, self._schedule), self._bytes
        return self._estimate.share(self._bytes - self._estimated_from)

    @property
    def worked(self) -> bool:
        """Whether there was a data set to write, finished pieces included."""
        return self._plan is not None

    def close(self) -> None:
        """Remove the bar."""
        self._bars.close()

    def summary(self) -> str:
        """What was done by this process, in one line."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"{self._documents:,} documents, {self._tokens:,} tokens, {self._bytes / 1e6:,.1f} MB of text "
            f"in {seconds:.1f} s ({self._bytes / 1e6 / seconds:,.1f} MB/s)"
        )
