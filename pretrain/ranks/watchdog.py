"""A run that stops moving ends with a name and every rank's stacks, instead of burning the allocation.

A thread of each rank tells rank 0 every few seconds how often the rank has moved and what it is doing, beside the
collectives (`pretrain.ranks.lifelines`), and hears the same of rank 0. A rank that has not moved for too long says so;
rank 0 then ends all of them, and every rank that can still run writes its stacks. The rank that has moved least is the
one the others wait for. A rank whose process is gone ends the others within a minute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
import time
import traceback as tracebacks
from pathlib import Path
from types import TracebackType

from data_prep.files import write_text
from pretrain.errors import LaunchError
from pretrain.ranks.agreement import gather
from pretrain.ranks.environment import Ranks
from pretrain.ranks.lifelines import Lifelines, State
from pretrain.ranks.signals import EXIT_STALLED

# Where collectives notice a dead rank themselves, they say more about it.
_GONE_SECONDS = 15.0


class Watchdog:
    """Ends the process with EXIT_STALLED when this or another rank does not move for `timeout` seconds, or is gone.

    Use as a context manager after the process group exists (all ranks together), and call `beat` wherever the loop
    moves on. Stacks go to `folder`/<UTC time of the start>/rank-00000.txt, with report.txt beside them.

    Args:
        folder: RUN/stacks.
        ranks: this process's place.
        timeout: seconds without a beat after which a rank counts as stalled.

    Raises:
        LaunchError: on all ranks alike, for a folder that one of them cannot make, and for ranks that do not reach
            rank 0.
    """

    def __init__(self, folder: str | os.PathLike[str], ranks: Ranks, timeout: float) -> None:
        self._folder = Path(folder)
        self._ranks = ranks
        self._timeout = timeout
        self._interval = min(5.0, timeout / 8)
        self._patience = max(1.0, min(20.0, timeout / 4))
        self._alone = False
        self._lifelines: Lifelines | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beat = (0, "start", time.monotonic(), timeout)

    def __enter__(self) -> Watchdog:
        problem = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{self._folder}: cannot be made ({error.strerror}); choose another run_dir, or repair this one."
        mine = (time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), problem)
        several = self._ranks.world_size > 1
        facts = gather(mine) if several else [mine]
        for _, found in facts:
            if found is not None:
                raise LaunchError(found)
        # The same on all ranks, and known before anything stalls.
        self._incident = self._folder / facts[0][0]
        self._lifelines = Lifelines(self._ranks) if several else None
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._interval + self._patience)
        if self._lifelines is not None:
            count, doing, *_ = self._beat
            self._lifelines.close(State(count, doing, leaving=True) if kind is None else None)
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, *, allow: float | None = None, alone: bool = False) -> None:
        """This rank has moved on and now does `doing`, for which it may take `allow` seconds (default: the timeout);
        `alone` if it does not wait for other ranks meanwhile, so that their end does not end this one.
        """
        self._alone = alone
        self._beat = (self._beat[0] + 1, doing, time.monotonic(), allow or self._timeout)

    def move(self) -> None:
        """This rank goes on with what it does: called before every collective, so that the rank which has not come to
        the one where the others wait has moved least.
        """
        count, doing, _, allowed = self._beat
        self._beat = (count + 1, doing, time.monotonic(), allowed)

    def _watch(self) -> None:
        try:
            while not self._done.wait(self._interval):
                self._look()
        except Exception:
            faulthandler.cancel_dump_traceback_later()
            if not self._done.is_set():
                _say(
                    f"rank {self._ranks.rank}: the watchdog has failed and watches no more; training goes on.\n"
                    f"{tracebacks.format_exc()}"
                )

    def _look(self) -> None:
        count, doing, since, allowed = self._beat
        # If Python itself stops, this thread included, a thread of faulthandler writes the stacks and ends the process.
        latest = allowed + 5 * self._interval + 3 * self._patience
        faulthandler.dump_traceback_later(latest, exit=True, file=sys.__stderr__ or 2)
        quiet = time.monotonic() - since
        stalled = math.ceil(quiet) if quiet > allowed else 0
        if self._lifelines is None:
            if stalled:
                self._end(self._report_stalled(self._ranks.rank, stalled))
            return
        self._lifelines.tell(State(count, doing, stalled))
        self._lifelines.listen()
        heard = {rank: state for rank, (state, _) in self._lifelines.heard.items()}
        gone = [rank for rank, seconds in self._lifelines.lost().items() if seconds > _GONE_SECONDS]
        if any(state.ending for state in heard.values()):
            self._end(None)
        elif gone and not self._alone:
            self._end(self._report_gone(gone))
        elif self._ranks.rank == 0:
            told = {0: stalled, **{rank: state.stalled for rank, state in heard.items()}}
            for rank, seconds in told.items():
                if seconds:
                    self._end(self._report_stalled(rank, seconds))
        elif stalled and quiet > allowed + self._interval + self._patience:
            # Rank 0 was told and has not answered.
            self._end(self._report_stalled(self._ranks.rank, stalled))

    def _end(self, report: str | None) -> None:
        """Write this rank's stacks, and the report where this rank is the one that makes it; end the process."""
        try:
            faulthandler.cancel_dump_traceback_later()
            if self._lifelines is not None and self._ranks.rank == 0:
                self._lifelines.tell(State(self._beat[0], self._beat[1], ending=True))
            with contextlib.suppress(OSError):
                self._write_stacks()
            if report is not None:
                _say(report)
                with contextlib.suppress(OSError):
                    write_text(self._incident / "report.txt", report)
            # The launcher kills the other ranks when the first one leaves; they still write their stacks.
            time.sleep(3 * self._interval)
        finally:
            os._exit(EXIT_STALLED)

    def _write_stacks(self) -> None:
        self._incident.mkdir(parents=True, exist_ok=True)
        with (self._incident / f"rank-{self._ranks.rank:05d}.txt").open("w", encoding="utf-8") as stream:
            count, doing, since, _ = self._beat
            quiet = time.monotonic() - since
            stream.write(
                f"rank {self._ranks.rank} on {socket.gethostname()}: {doing} for {quiet:.0f} s, beat {count}\n\n"
            )
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)

    def _report_gone(self, gone: list[int]) -> str:
        lines = ["The processes of these ranks are gone, and without them the others cannot go on:\n"]
        lines += [self._describe(rank, "its process no longer answers") for rank in gone]
        return "".join([*lines, f"Stacks of the ranks that still run: {self._incident}\n"])

    def _report_stalled(self, rank: int, quiet: int) -> str:
        lines = [f"The run has stopped moving: rank {rank} noticed after {quiet} s.\n"]
        heard = {} if self._lifelines is None else self._lifelines.heard
        latest = time.monotonic() - 4 * self._interval - 1
        # Rank 0 hears all others, and they hear rank 0.
        audible = [0] if self._ranks.rank != 0 else range(1, self._ranks.world_size)
        silent = [rank for rank in audible if rank not in heard or heard[rank][1] < latest]
        beats = {self._ranks.rank: self._beat[0], **{rank: state.beats for rank, (state, _) in heard.items()}}
        behind = [rank for rank, count in sorted(beats.items()) if count == min(beats.values())]
        if len(behind) < len(beats):
            lines += [self._describe(rank, "the others wait for it") for rank in behind]
        elif not silent and len(beats) > 1:
            lines.append("All ranks have moved equally often: they are inside the same collective or the same wait.\n")
        lines += [self._describe(rank, "its process no longer answers") for rank in silent]
        return "".join([*lines, f"Stacks of the ranks that still run: {self._incident}\n"])

    def _describe(self, rank: int, why: str) -> str:
        if self._lifelines is None:
            return ""
        place = f"  rank {rank} on {self._lifelines.hosts[rank]}: {why}"
        if rank != self._ranks.rank and rank not in self._lifelines.heard:
            return f"{place}; it has never said what it was doing\n"
        mine = State(*self._beat[:2])
        state = mine if rank == self._ranks.rank else self._lifelines.heard[rank][0]
        return f"{place}; it was doing '{state.doing}', beat {state.beats}\n"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
