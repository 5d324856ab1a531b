"""Paths from outside: kept inside their folder, and compared independently of their spelling."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from data_prep.errors import DataError

FileIdentity = tuple[int, int] | str


def inside(folder: str | os.PathLike[str], name: object, where: object) -> Path:
    """The path of `name` in `folder`; `where` begins the message when it, or where its links lead, lies elsewhere.

    Raises:
        DataError: `name` is no relative path in a file system's terms, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()  # none for the folder itself
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in str(name):
        raise DataError(f"{where}: {name!r} is not the name of a file inside {folder}.")
    path = Path(folder) / str(name)
    try:
        real, root = path.resolve(), Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: {name!r} cannot be looked up in {folder}: {error}.") from None
    if not real.is_relative_to(root):
        raise DataError(f"{where}: {name!r} leads out of {folder}, to {real}.")
    return path


def new_folder(path: str | os.PathLike[str]) -> Path:
    """`path`, where a new folder is to be written.

    Raises:
        DataError: it exists and is not an empty folder.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already and is not empty; remove it or name another --out.")
    return folder


def identity(path: str | os.PathLike[str]) -> FileIdentity:
    """Equal for two paths of the same file: device and inode, or the real path of a file that is missing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino
