"""Requests to stop with a checkpoint, from signals, files in the run folder and the clock; polled once a step.

The loop polls on every rank and all ranks act on the strongest answer, in the same step.
Evaluations poll before every forward pass (`pretrain.ranks.lockstep`).

Exit codes that launch scripts understand are the constants below.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from pretrain.ranks.environment import read_integer

EXIT_FINISHED = 0
EXIT_FAILED = 1  # an error with a traceback, or ranks that did not meet: another start may go well
EXIT_USER = 2  # a message for a person; starting again without a change ends the same way
EXIT_NO_PROGRESS = 73  # restarted several times without one new checkpoint
EXIT_STALLED = 74  # the watchdog ended a run: a rank had stopped moving or was gone; its last checkpoint is valid
EXIT_AGAIN = 75  # stopped early with a checkpoint (signal, time limit): start the same command again
EXIT_HELD = 76  # stopped by hand (RUN/stop) with a checkpoint: nothing should start it again by itself

STOP_FILE = "stop"
CHECKPOINT_FILE = "checkpoint"
_REPEATED_SECONDS = 1.0


class Request(enum.IntEnum):
    """What the loop is asked to do; the larger wins when ranks differ."""

    NONE = 0
    CHECKPOINT = 1  # write a checkpoint and go on
    STOP = 2  # write a checkpoint and exit; to be started again
    HOLD = 3  # write a checkpoint and exit; by a person's hand

    @property
    def stops(self) -> bool:
        return self >= Request.STOP

    @property
    def exit_code(self) -> int:
        return {Request.STOP: EXIT_AGAIN, Request.HOLD: EXIT_HELD}.get(self, EXIT_FINISHED)


_FILES = {STOP_FILE: Request.HOLD, CHECKPOINT_FILE: Request.CHECKPOINT}


class Asked(NamedTuple):
    """What the ranks are asked to do: the strongest request, and the first rank that had it."""

    request: Request = Request.NONE
    rank: int = 0

    @classmethod
    def strongest(cls, requests: Sequence[float]) -> Asked:
        """Of the requests of all ranks."""
        most = max(requests)
        return cls(Request(int(most)), requests.index(most))


class StopRequest:
    """Collects what asks this rank to stop or to write a checkpoint.

    SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and, unless it is ignored (nohup), SIGHUP ask to stop. A second SIGTERM or SIGINT
    ends the process with 128 + its number, as soon as the interpreter runs. The other signals announce an end and never
    count as the first of two; launchers repeat a terminal's Ctrl-C, so repetitions within a second count as one.

    Args:
        run_folder: folder watched for the files `stop` and `checkpoint`; None on ranks that do not look (on a shared
            file system only rank 0 should).
        wall_clock: seconds from now until the run should have stopped; None for no limit.
        environ: where SLURM_JOB_END_TIME (seconds since 1970) is read.

    Attributes:
        reserve: seconds before a time limit at which to stop; raise it when checkpoints take longer. The longest time
            between two polls (a step, or the preparation of an evaluation) is added.
        reason: why `poll` asked to stop or for a checkpoint.

    Raises:
        LaunchError: for an unreadable SLURM_JOB_END_TIME.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str] | None = None,
        *,
        wall_clock: float | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.reserve = 120.0
        self.reason: str | None = None
        watched = _FILES if run_folder is not None else {}
        self._files = {os.path.join(str(run_folder), name): request for name, request in watched.items()}
        self._deadline = None if wall_clock is None else time.monotonic() + wall_clock
        end = environ.get("SLURM_JOB_END_TIME")
        self._job_end = read_integer("SLURM_JOB_END_TIME", end, largest=10**10) if end else None
        self._polled: float | None = None
        self._longest = 0.0
        self._seen: set[str] = set()
        self._unremovable: set[str] = set()
        self._process = os.getpid()
        self._signalled: str | None = None
        self._first_of_two: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers; only the main thread may."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup, to outlive its terminal
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def poll(self) -> Request:
        """The strongest request so far, on this rank alone; `reason` then says why. Costs two stat calls at most."""
        found = [(Request.STOP, self._signalled)] if self._signalled else []
        now = time.monotonic()
        self._longest = max(self._longest, 0.0 if self._polled is None else now - self._polled)
        self._polled = now
        needed = self.reserve + self._longest
        for limit, end, clock in (
            ("the wall-clock limit", self._deadline, now),
            ("the Slurm job's end", self._job_end, time.time()),
        ):
            if end is not None and clock >= end - needed:
                found.append((Request.STOP, f"{limit} is near, and stopping may take {needed:.0f} s"))
        for file, request in self._files.items():
            # Path.exists raises what a network file system says in a bad moment, which must not end a run.
            if file not in self._unremovable and os.path.exists(file):
                found.append((request, f"{file} was made"))
                self._seen.add(file)
        if not found:
            return Request.NONE
        request, self.reason = max(found, key=lambda item: item[0])
        return request

    def acknowledge(self) -> None:
        """Remove the request files that `poll` has seen; call it once their checkpoint is complete. Files made since
        then stay, because nothing has acted on them.
        """
        for file in self._seen:
            try:
                os.unlink(file)
            except FileNotFoundError:
                pass
            except OSError:
                self._unremovable.add(file)  # a folder of that name, another user's file: acted on once
        self._seen.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked process (a worker of a library's pool) ends by its own signals.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._signalled is None:
            self._signalled = f"{signal.Signals(number).name} was received"
        if number in (signal.SIGTERM, signal.SIGINT):
            now = time.monotonic()
            if self._first_of_two is None:
                self._first_of_two = now
            elif now - self._first_of_two > _REPEATED_SECONDS:
                with contextlib.suppress(OSError):
                    os.write(2, f"{signal.Signals(number).name} a second time: ending at once.\n".encode())
                os._exit(128 + number)
