"""One way to keep other processes out of a folder, on every file system."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

# A network file system without its lock service, a driver without the call (Lustre mounted without locks, FUSE).
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY})


def lock(stream: IO[Any], *, wait: bool = False) -> bool:
    """Lock a file, open for writing, for this process until it closes the file; with `wait`, once others let it go.

    The kernel gives the lock back however the process ends, and processes that it has forked do not inherit it. On a
    file system without locks there is none, and every process goes on as if it had it.

    Returns:
        Whether no other process has it.

    Raises:
        OSError: as the file system says.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True
