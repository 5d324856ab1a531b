"""One job at a time in a run folder, and one folder for all ranks of the job.

Two jobs on one folder (submitted twice, or requeued while the old one still ends) would remove each other's unfinished
checkpoints and mix their records. Ranks that see different folders under one path (a node's own disk) would write
checkpoints of which no start finds all files.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.locks import locked
from pretrain.errors import RunError
from pretrain.ranks.agreement import gather, on_first_rank
from pretrain.ranks.environment import Ranks

LOCK_FILE = ".lock"
# The job before may still write its last checkpoint; a file server keeps a dead node's locks for a minute or two, and
# may show a new file to other nodes only then.
_PATIENCE = 180.0


@contextmanager
def sole_job(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other job trains in `folder`, which every rank sees. Collective.

    Raises:
        RunError: on all ranks, when another job is there and stays, when the folder cannot be written to, or when ranks
            do not see what rank 0 writes there.
    """
    busy, advice = f"{folder}: another job is training there", "wait for it, or end it, and start again"
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            lock = locked(folder / LOCK_FILE, busy, patience=_PATIENCE, advice=advice)
            try:
                return stack.enter_context(lock)
            except OSError as error:
                raise RunError(
                    f"{folder}: the run cannot be begun there ({error}); make room, or choose another run_dir."
                ) from None

        text = on_first_rank(begin)
        blind = None if ranks.rank == 0 or sees(folder, text, _PATIENCE) else socket.gethostname()
        for rank, host in enumerate(gather(blind)):
            if host is not None:
                raise RunError(
                    f"{folder}: rank {rank} on {host} does not find there what rank 0 writes, so checkpoints would be "
                    "in pieces; choose a run_dir on a file system that all nodes share."
                )
        yield


def sees(folder: Path, text: str, patience: float) -> bool:
    """Whether this process finds in the folder, within `patience` seconds, what rank 0 has written there."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (folder / LOCK_FILE).read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(1.0)
