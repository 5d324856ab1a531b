"""A run that stops moving ends with a name and every rank's stack, instead of burning the allocation.

Each rank's thread keeps a line about itself (how often it has moved, what it is doing) on a small key-value store
that rank 0 serves beside the collectives. The first rank that has not moved for too long raises the alarm there;
every rank that can still run writes its stacks, and all end. The rank that has moved least is the one the others wait
for. A rank whose process is gone (`pretrain.lifelines`) ends the others within a minute.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeVar

from data_prep.files import write_text
from pretrain.environment import Ranks
from pretrain.errors import LaunchError
from pretrain.lifelines import Lifelines
from pretrain.signals import EXIT_STALLED

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_ALARM = "alarm"
_STORE_TIMEOUT = datetime.timedelta(seconds=20)
# Where collectives notice a dead rank themselves, they say more about it.
_GONE_SECONDS = 15.0
_Answer = TypeVar("_Answer")


class Watchdog:
    """Ends the process with EXIT_STALLED when this or another rank does not move for `timeout` seconds, or is gone.

    Use as a context manager after the process group exists (all ranks together), and call `beat` wherever the loop
    moves on. Stacks go to `folder`/<UTC time>/rank-00000.txt, with report.txt beside them.

    Args:
        folder: RUN/stacks.
        ranks: this process's place.
        timeout: seconds without a beat after which a rank counts as stalled.
        on_stall: called on the rank that raises the alarm, in the watchdog's thread, with the report.

    Raises:
        LaunchError: for a timeout that is not positive, or a folder that cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        ranks: Ranks,
        timeout: float,
        on_stall: Callable[[str], None] | None = None,
    ) -> None:
        if timeout <= 0:
            raise LaunchError(f"The watchdog's timeout is {timeout} seconds; it must be positive.")
        self._folder = Path(folder)
        self._ranks = ranks
        self._timeout = timeout
        self._interval = min(5.0, timeout / 8)
        self._patience = max(1.0, min(_STORE_TIMEOUT.total_seconds(), timeout / 4))
        self._store_is_gone = False
        self._on_stall = on_stall
        self._store: TCPStore | None = None
        self._lifelines: Lifelines | None = None
        self._last_words: IO[str] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beat = (0, "start", time.monotonic(), timeout)

    def __enter__(self) -> Watchdog:
        if self._ranks.world_size > 1:
            self._store = self._open_store()
            self._lifelines = Lifelines(self._ranks)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._last_words = (self._folder / f"no-interpreter-{self._ranks.rank:05d}.txt").open("w", encoding="utf-8")
        except OSError as error:
            raise LaunchError(
                f"{self._folder}: cannot be written to ({error.strerror}); choose another run_dir, or mend this one."
            ) from None
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._interval + self._patience)
        if self._lifelines is not None:
            self._lifelines.close(goodbye=kind is None)
        faulthandler.cancel_dump_traceback_later()
        if self._last_words:
            self._last_words.close()
            with contextlib.suppress(OSError):
                if Path(self._last_words.name).stat().st_size == 0:
                    Path(self._last_words.name).unlink()

    def beat(self, doing: str, *, allow: float | None = None) -> None:
        """This rank has moved on and now does `doing`, for which it may take `allow` seconds (default: the timeout)."""
        self._beat = (self._beat[0] + 1, doing, time.monotonic(), allow or self._timeout)

    def move(self) -> None:
        """This rank goes on with what it does: called before every collective, so that the rank which has not come to
        the one where the others wait has moved least.
        """
        count, doing, _, allowed = self._beat
        self._beat = (count + 1, doing, time.monotonic(), allowed)

    def _open_store(self) -> TCPStore:
        """A store of the watchdog's own: the process group's is busy exactly when the collectives hang."""
        import torch.distributed as dist

        port: list[Any] = [None]
        server = None
        if self._ranks.rank == 0:
            server = dist.TCPStore("0.0.0.0", 0, None, True, timeout=_STORE_TIMEOUT, wait_for_workers=False)
            port = [server.port]
        dist.broadcast_object_list(port, src=0)
        return server or dist.TCPStore(
            self._ranks.master_address, port[0], None, False, timeout=_STORE_TIMEOUT, wait_for_workers=False
        )

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            count, doing, since, allowed = self._beat
            # Written by a thread of faulthandler's own if Python itself stops, even this thread with it.
            latest = allowed + 5 * self._interval + 3 * self._patience
            faulthandler.dump_traceback_later(latest, exit=True, file=self._last_words or sys.stderr)
            quiet = time.monotonic() - since
            alarm = self._exchange(count, doing)
            lost = {} if self._lifelines is None else self._lifelines.lost()
            gone = [rank for rank, seconds in lost.items() if seconds > _GONE_SECONDS]
            if alarm is None and (gone or quiet > allowed):
                alarm = self._raise_alarm(quiet, gone)
            if alarm is not None and not self._done.is_set():
                self._end(alarm)

    def _ask(self, question: Callable[[TCPStore], _Answer]) -> _Answer | None:
        """What the store answers; None without a store, or from the first time on that it fails or takes too long.

        A call to a frozen server never returns, so it is made where nobody has to wait for it.
        """
        store = self._store
        if store is None or self._store_is_gone:
            return None
        answers: list[_Answer] = []

        def call() -> None:
            with contextlib.suppress(Exception):  # torch raises several kinds when the server goes away
                answers.append(question(store))

        caller = threading.Thread(target=call, name="watchdog store", daemon=True)
        caller.start()
        caller.join(self._patience)
        if not answers:
            self._store_is_gone = True
            return None
        return answers[0]

    def _exchange(self, count: int, doing: str) -> dict[str, Any] | None:
        """Put this rank's line up; the alarm, if somebody has raised it."""

        def exchange(store: TCPStore) -> bytes:
            store.set(str(self._ranks.rank), line)
            return store.get(_ALARM) if store.check([_ALARM]) else b""

        line = json.dumps({"beats": count, "doing": doing, "host": socket.gethostname(), "time": time.time()})
        alarm = self._ask(exchange)
        return json.loads(alarm) if alarm else None

    def _raise_alarm(self, quiet: float, gone: list[int]) -> dict[str, Any]:
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        alarm = {"folder": name, "rank": self._ranks.rank, "quiet": quiet, "gone": gone}
        first = self._ask(lambda store: store.compare_set(_ALARM, "", json.dumps(alarm)))
        return json.loads(first) if first else alarm

    def _end(self, alarm: dict[str, Any]) -> None:
        faulthandler.cancel_dump_traceback_later()
        folder = self._folder / alarm["folder"]
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._ranks.rank:05d}.txt").open("w", encoding="utf-8") as stream:
                count, doing, since, _ = self._beat
                quiet = time.monotonic() - since
                stream.write(
                    f"rank {self._ranks.rank} on {socket.gethostname()}: {doing} for {quiet:.0f} s, beat {count}\n\n"
                )
                stream.flush()
                faulthandler.dump_traceback(file=stream, all_threads=True)
        if alarm["rank"] == self._ranks.rank:
            report = self._report(alarm, folder)
            with contextlib.suppress(OSError):
                sys.stderr.write(report)
                sys.stderr.flush()
            with contextlib.suppress(OSError):
                write_text(folder / "report.txt", report)
            if self._on_stall:
                with contextlib.suppress(Exception):
                    self._on_stall(report)
        # Leaving at once would take the store away from ranks that have not seen the alarm yet, or the report its
        # lines.
        time.sleep(3 * self._interval)
        os._exit(EXIT_STALLED)

    def _report(self, alarm: dict[str, Any], folder: Path) -> str:
        board, silent = self._read_board()
        if alarm["gone"]:
            lines = ["The processes of these ranks are gone, and without them the others cannot go on:\n"]
            silent = alarm["gone"]
        else:
            lines = [f"The run has stopped moving: rank {alarm['rank']} noticed after {alarm['quiet']:.0f} s.\n"]
        if board and not alarm["gone"]:
            least = min(line["beats"] for line in board.values())
            behind = [rank for rank, line in board.items() if line["beats"] == least]
            if len(behind) < len(board):
                lines += [_describe(rank, board[rank], "the others wait for it") for rank in behind]
            elif not silent:
                lines.append(
                    "All ranks have moved equally often: they are inside the same collective or the same wait.\n"
                )
        for rank in silent:
            lines.append(
                _describe(rank, board[rank], "its process no longer answers")
                if rank in board
                else f"  rank {rank} does not answer: its process is frozen, or it or the network to it is gone\n"
            )
        lines.append(f"Stacks of the ranks that still run: {folder}\n")
        return "".join(lines)

    def _read_board(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Each rank's last line, and the ranks that have stopped writing theirs."""
        if self._store is None:
            return {}, []

        def read(store: TCPStore) -> dict[int, dict[str, Any]]:
            written = [rank for rank in range(self._ranks.world_size) if store.check([str(rank)])]
            return {rank: json.loads(store.get(str(rank))) for rank in written}

        board = self._ask(read)
        if board is None:
            return {}, [0]  # which serves the store
        newest = max((line["time"] for line in board.values()), default=0.0)
        # Clocks of nodes differ by less than this where anything else works.
        latest = newest - 4 * self._interval - 1
        return board, [
            rank for rank in range(self._ranks.world_size) if rank not in board or board[rank]["time"] < latest
        ]


def _describe(rank: int, line: dict[str, Any], why: str) -> str:
    return f"  rank {rank} on {line['host']}: {why}; it was doing '{line['doing']}', beat {line['beats']}\n"
