"""Workers: each does one piece at a time and reports through a pipe of its own.

The first is a thread of this process, which has an encoder loaded and checked already; the others are processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.base import Group
from data_prep.sources.groups import pieces_expected
from data_prep.tokenizers.loading import load_tokenizer
from data_prep.tokenizing.encoder import Engine, first_choice
from data_prep.tokenizing.piece import PieceWorker, Progress
from data_prep.tokenizing.piece_schedule import Key, Schedule
from data_prep.tokenizing.receipts import read_receipt, receipt_path
from data_prep.tokenizing.shard_plan import Plan

_TRIES = 3  # a piece that takes its worker down this often stops the run


@dataclass
class _Worker:
    number: int
    process: Any  # a process of multiprocessing, or the `_Thread`
    pipe: Connection
    piece: Key | None = None
    knows_plan: bool = False


@dataclass
class Pool:
    """Runs a schedule on `count` processors: on this process and `count - 1` others.

    The others can be started ahead of the plan: they load what they will need while this one makes it. As a context
    manager it ends them.

    tokenizer, eod_token: as for `load_tokenizer`. on_progress: called with (worker number, piece, Progress).
    """

    folder: Path
    tokenizer: str
    eod_token: str
    count: int
    on_progress: Callable[[int, Key, Progress], None]
    plan: Plan = field(init=False)
    schedule: Schedule = field(init=False)
    _workers: list[_Worker] = field(default_factory=list)
    _losses: dict[Key, int] = field(default_factory=dict)

    def __enter__(self) -> Pool:
        return self

    def start(self, groups: tuple[Group, ...]) -> None:
        """Start as many processes beside this one as there can be pieces for."""
        for number in range(1, min(self.count, sum(pieces_expected(group) for group in groups))):
            self._start(number)

    def run(self, plan: Plan, schedule: Schedule, engine: Engine | None = None) -> None:
        """Do all pieces. `engine`: for work in this process.

        Raises:
            DataError: as a worker raised it, or a piece killed its worker three times.
            OSError: a worker could not write.
        """
        self.plan, self.schedule = plan, schedule
        ours, theirs = multiprocessing.Pipe()
        thread = _Thread(PieceWorker(self.folder, plan, engine), theirs)
        thread.start()
        self._workers.insert(0, _Worker(0, thread, ours, knows_plan=True))
        while not self.schedule.complete:
            self._assign()
            busy = [worker for worker in self._workers if worker.piece is not None]
            if not busy:
                break
            for pipe in wait([worker.pipe for worker in busy], timeout=1.0):
                self._hear(next(worker for worker in busy if worker.pipe is pipe))

    def _assign(self) -> None:
        idle = [worker for worker in self._workers if worker.piece is None]
        while len(self._workers) < self.count or idle:
            number = idle[0].number if idle else self._free_number()
            key = self.schedule.take(number)
            if key is None:
                return
            worker = idle.pop(0) if idle else self._start(number)
            worker.piece = key
            try:
                if not worker.knows_plan:
                    worker.pipe.send(self.plan)
                    worker.knows_plan = True
                worker.pipe.send(key)
            except OSError:
                self._lose(worker)

    def _free_number(self) -> int:
        taken = {worker.number for worker in self._workers}
        return next(number for number in range(self.count) if number not in taken)

    def _start(self, number: int) -> _Worker:
        # Spawned, not forked: a copy of the parent would hold its locks and threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_main, args=(str(self.folder), self.tokenizer, self.eod_token, theirs, os.getpid())
        )
        process.start()
        theirs.close()
        worker = _Worker(number, process, ours)
        self._workers.append(worker)
        return worker

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker)
            return
        key = worker.piece
        assert key is not None
        if isinstance(message, Progress):
            self.on_progress(worker.number, key, message)
        elif message == "done":
            worker.piece = None
            self.schedule.add(read_receipt(receipt_path(self.folder, *key)))
        else:
            raise message

    def _lose(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        if isinstance(worker.process, _Thread):
            raise worker.process.failure
        for key in self.schedule.lost(worker.number):
            self._losses[key] = self._losses.get(key, 0) + 1
            if self._losses[key] == _TRIES:
                files = ", ".join(self.plan.groups[key[0]].files) or self.plan.groups[key[0]].source
                raise DataError(
                    f"the worker at piece {key[1]} of {files} was killed {_TRIES} times (exit code "
                    f"{worker.process.exitcode}); out of memory is the usual reason: use fewer --workers. "
                    "Run the same command again to continue."
                )

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
        processes = [worker for worker in self._workers if not isinstance(worker.process, _Thread)]
        for worker in processes:
            worker.process.join(timeout=0.2 if worker.piece is None else 0)
            if worker.process.is_alive():
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=10)
        for worker in processes:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


class _Thread(threading.Thread):
    """The worker of this process.

    failure: what ended it.
    """

    failure: BaseException

    def __init__(self, worker: PieceWorker, pipe: Connection) -> None:
        super().__init__(name="worker-0", daemon=True)
        self._worker, self._pipe = worker, pipe

    def run(self) -> None:
        try:
            _serve(self._worker, self._pipe)
        except BaseException as error:
            self.failure = error
        finally:
            self._worker.close()
            self._pipe.close()


def quiet_libraries() -> None:
    """One thread for this process: the tokenizer library would start one for every processor."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _main(folder: str, tokenizer: str, eod_token: str, pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    quiet_libraries()
    try:
        try:
            engine = first_choice(load_tokenizer(tokenizer, eod_token))
        except DataError:
            engine = None  # the parent reports the same error
        plan: Plan = pipe.recv()
        if engine is not None and (engine.name, engine.tokenizer.fingerprint) != (
            plan.engine["name"],
            plan.tokenizer.fingerprint,
        ):
            engine = None
        _serve(PieceWorker(Path(folder), plan, engine), pipe, parent)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has finished or died
    except (DataError, OSError) as error:
        pipe.send(error if isinstance(error, DataError) else OSError(error.errno, str(error)))


def _serve(worker: PieceWorker, pipe: Connection, parent: int | None = None) -> None:
    """Do the pieces that are asked for, until the pipe ends or the process `parent` dies."""
    while True:
        key = pipe.recv()
        for progress in worker.work(*key):
            pipe.send(progress)
            if parent is not None and os.getppid() != parent:
                return
        pipe.send("done")
