"""The one way to keep other processes out of a folder, on every file system.

    with locked(folder / "lock", f"another process is writing {folder}", patience=0.0):
        ...                                  # no other process is inside; DataError, naming the other one, if it is

Whoever holds the lock has written its host, process and Slurm job into the file. The kernel gives the lock back however
the process ends, and forked processes do not inherit it. (POSIX locks also end when the process that holds them closes
any other opening of the same file, so do not read the file where you hold it.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError
from data_prep.plain_text import say

# A network file system without its lock service, a driver without the call (Lustre mounted without locks, FUSE).
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY})
_POLL_SECONDS = 1.0


@contextmanager
def locked(file: Path, busy: str, *, patience: float = math.inf, advice: str = "wait for it to end") -> Iterator[str]:
    """Inside, no other process holds the lock of `file`. Yields what the file says, unique to this call.

    A file system without locks has none: every process goes on as if it held the lock.

    Args:
        file: created when missing, with its folder; it stays afterwards.
        busy: begins the messages about another process that holds the lock: "RUN: another job is training there".
        patience: seconds to wait for it: 0 refuses at once, infinity waits until it ends. A line on standard error
            says that this process waits.
        advice: ends the message of the error: what to do.

    Raises:
        DataError: another process keeps the lock for `patience` seconds; names it where it is known.
        OSError: as the file system says.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    waiting = False
    with file.open("a+", encoding="utf-8", errors="replace") as stream:
        while not lock(stream):
            stream.seek(0)
            holder = stream.read(1000).strip() or "its name is not known"
            if time.monotonic() >= end:
                raise DataError(f"{busy} ({holder}); {advice}.")
            if not waiting:
                say(f"{busy} ({holder}); waiting for it.", error=True)
            waiting = True
            time.sleep(_POLL_SECONDS)
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "token": secrets.token_hex(4),
            }
        )
        stream.truncate(0)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
        yield text


def lock(stream: IO[Any], *, wait: bool = False) -> bool:
    """Lock a file, open for writing, until this process closes it; with `wait`, once others let it go.

    Returns:
        Whether no other process holds it.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True
