"""Writing and reading the files of a checkpoint on one rank: checksummed, retried, in a thread if asked, never raising
half-way.

DeepSpeed's `save_checkpoint` meets other ranks between its writes, so an exception on one rank would leave the others
waiting. Here a failure is remembered, and the ranks agree on it afterwards.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from pretrain.checkpoints.restricted_loading import load_restricted

_RETRY_SECONDS = (0.5, 2.0, 5.0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class CheckpointFiles(CheckpointEngine):
    """What DeepSpeed calls to write and read; plugged in as `engine.checkpoint_engine`.

    Args:
        asynchronous: copy tensors to memory in `save` and write them in a thread.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        super().__init__()
        self.name = "CheckpointFiles"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: list[Future[None]] = []
        self._written: dict[str, dict[str, Any]] = {}
        self._error: str | None = None

    def start(self) -> None:
        """Forget the previous checkpoint's files and errors."""
        self._written, self._error = {}, None

    @property
    def done(self) -> bool:
        """True when nothing is being written any more."""
        return all(future.done() for future in self._pending)

    def collect(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Wait for the writes: {file name: {bytes, sha256}} of what this rank wrote, and what went wrong, if
        anything.
        """
        for future in self._pending:
            future.result()
        self._pending = []
        return self._written, self._error

    def close(self) -> None:
        """End the writing thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def create(self, info: Any) -> None:
        """Part of DeepSpeed's interface; the store prepares the folder."""

    def commit(self, info: Any) -> bool:
        """Part of DeepSpeed's interface; the store commits, once every rank's files are complete."""
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._error = self._error or _describe(error, Path(path))

    def preserves_storage_sharing(self) -> bool:
        return True

    def save(self, state_dict: Any, path: str) -> None:
        if self._error is not None:
            return
        if self._thread is None:
            self._write(state_dict, Path(path))
        else:
            self._pending.append(self._thread.submit(self._write, _copy_to_memory(state_dict), Path(path)))

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_restricted(Path(path), map_location=map_location)

    def _write(self, state: Any, path: Path) -> None:
        for pause in (*_RETRY_SECONDS, None):
            try:
                self._written[path.name] = _save_hashed(state, path)
                return
            # torch reports a failed write of its archive as RuntimeError
            except (OSError, RuntimeError) as error:
                if pause is None or (isinstance(error, OSError) and error.errno in _FULL):
                    self._error = self._error or _describe(error, path)
                    return
                time.sleep(pause)


class _HashingStream:
    """A file that hashes what passes through; keeps the first OSError, which torch's archive writer hides."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def _save_hashed(state: Any, path: Path) -> dict[str, Any]:
    with path.open("wb") as stream:
        hashing = _HashingStream(stream)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        except (OSError, RuntimeError):
            if hashing.error is not None:
                raise hashing.error from None
            raise
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def _copy_to_memory(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        moved = value.detach().cpu()
        return moved.clone() if moved.data_ptr() == value.data_ptr() else moved
    if isinstance(value, dict):
        result = copy.copy(value)
        result.update({key: _copy_to_memory(inner) for key, inner in value.items()})
        return result
    if type(value) in (list, tuple):
        return type(value)(_copy_to_memory(inner) for inner in value)
    return copy.deepcopy(value)


def _describe(error: Exception, path: Path) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path.parent}: the disk is full"
    return f"{path}: {error}"
