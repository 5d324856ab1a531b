"""One job at a time in a run folder, and one folder for all ranks of the job.

Two jobs on one folder (submitted twice, or requeued while the old one still ends) would take each other's unfinished
checkpoints away and mix their records. Ranks that see different folders under one path (a node's own disk) would each
keep their part of every checkpoint where no start finds it together.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_prep.locks import lock
from data_prep.plain_text import say
from pretrain.errors import RunError
from pretrain.ranks.agreement import gather, on_first_rank
from pretrain.ranks.environment import Ranks

LOCK_FILE = ".lock"
# The job before may still write its last checkpoint; a file server keeps a dead node's locks for a minute or two, and
# may show a new file to other nodes only then.
_PATIENCE = 180.0
_POLL_SECONDS = 1.0


@contextmanager
def sole_job(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other job trains in `folder`, which every rank sees. Collective.

    Raises:
        RunError: on all ranks, when another job is there and stays, when the folder cannot be written to, or when ranks
            do not see what rank 0 writes there.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            stream, token = take(folder, _PATIENCE)
            stack.enter_context(stream)
            return token

        token = on_first_rank(begin)
        blind = None if ranks.rank == 0 or sees(folder, token, _PATIENCE) else socket.gethostname()
        for rank, host in enumerate(gather(blind)):
            if host is not None:
                raise RunError(
                    f"{folder}: rank {rank} on {host} does not find there what rank 0 writes, so checkpoints would be "
                    "in pieces; choose a run_dir on a file system that all nodes share."
                )
        yield


def take(folder: Path, patience: float) -> tuple[IO[str], str]:
    """Lock a run folder: (the open file that holds the lock until it is closed, what the file says).

    Raises:
        RunError: another process has it and keeps it for `patience` seconds, or the folder cannot be written to.
    """
    file = folder / LOCK_FILE
    end = time.monotonic() + patience
    waiting = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
        while not lock(stream):
            stream.seek(0)
            holder = stream.read().strip() or "nobody who wrote its name"
            if time.monotonic() >= end:
                stream.close()
                raise RunError(
                    f"{folder}: another job is training there ({holder}); wait for it, or end it, and start again."
                )
            if not waiting:
                say(f"{folder}: waiting for a job that is training there ({holder}).", error=True)
            waiting = True
            time.sleep(_POLL_SECONDS)
        mine = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "token": secrets.token_hex(4),
        }
        text = json.dumps(mine)
        stream.truncate(0)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
        raise RunError(
            f"{folder}: the run cannot be begun there ({error}); make room, or choose another run_dir."
        ) from None
    return stream, text


def sees(folder: Path, text: str, patience: float) -> bool:
    """Whether this process finds in the folder what the job's first rank has written there."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (folder / LOCK_FILE).read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
