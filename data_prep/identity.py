"""Whether two paths name the same file, however they are spelled: links of both kinds lead to it too."""

from __future__ import annotations

import os

FileIdentity = tuple[int, int] | str


def identity(path: str | os.PathLike[str]) -> FileIdentity:
    """What is equal for two paths of the same file: device and inode, or the real path of what is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino
