"""Bytes of a file, decompressed, with every way of being broken told apart from a regular end."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from pathlib import Path
from typing import Any

import zstandard

from data_prep.sources.base import SourceError

COMPRESSIONS = (".zst", ".zstd", ".gz", ".xz", ".bz2")
_CHUNK = 1 << 20
# One byte of zstd input can stand for 32 KB of output, so the input handed over at once bounds memory. A byte of bzip2
# can stand for a megabyte; its decompressor and that of xz can be told how much to give at once.
_STEP = {".zst": 4096, ".gz": 16384, ".xz": 16384, ".bz2": 16384}
_BOUNDED = (".xz", ".bz2")
_BURST = 4 << 20
_WINDOW = 2**31  # bytes of earlier output that a file may refer to: as much as `zstd --long=31` does


def compression(path: str | os.PathLike[str]) -> str:
    """The compression a file name ends in (`.zst` for `.zstd` too), or an empty string."""
    suffix = Path(path).suffix.lower()
    return {".zstd": ".zst"}.get(suffix, suffix) if suffix in COMPRESSIONS else ""


class ByteStream:
    """Reads a plain or compressed file from its beginning.

    Everything in front of the first damage is handed out before the error is raised, and the error is raised again by
    every later read: two readers of a damaged file see the same, however they read.

    offset: decompressed bytes handed out. consumed: bytes taken from the file on disk.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.offset = 0
        self._kind = compression(path)
        self._failure: SourceError | None = None
        self._pending = memoryview(b"")  # decompressed, not handed out
        self._input = memoryview(b"")
        self._frame: Any = None  # decompressor of the frame under way
        self._frames = 0
        self._step = _STEP.get(self._kind, 0)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise SourceError("unreadable_file", f"{path} cannot be opened: {error.strerror}") from None

    @property
    def consumed(self) -> int:
        """Bytes of the file on disk that are behind the reading position."""
        return self._file.tell()

    def seek(self, offset: int) -> None:
        """Go to a decompressed `offset` that is not behind the current one; costs nothing on plain files.

        Raises:
            SourceError: the data is damaged in front of `offset`.
        """
        if not self._kind:
            self._file.seek(offset)
            self.offset = offset
            return
        while self.offset < offset:
            if not self.read(min(_CHUNK, offset - self.offset)):
                return

    def read(self, size: int = _CHUNK) -> bytes:
        """Up to `size` bytes; empty only at the regular end.

        Raises:
            SourceError: `unreadable_file`, or `broken_compression` for damaged or truncated data.
        """
        data = b""
        if self._kind:
            data = self._decompressed(size)
        elif self._failure is None:
            data = self._raw(size)
        if not data and self._failure is not None:
            raise self._failure
        self.offset += len(data)
        return data

    def head(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the regular end.

        Raises:
            SourceError: as `read`.
        """
        parts = []
        while size > 0 and (part := self.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _raw(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self._failure = SourceError(
                "unreadable_file", f"{self.path}: reading failed after {self.offset} bytes: {error.strerror or error}"
            )
            return b""

    def _decompressed(self, size: int) -> bytes:
        parts = [self._pending]
        total = len(self._pending)
        while total < size and self._failure is None:
            if not self._input and not self._holds_output():
                self._input = memoryview(self._raw(1 << 16))
                if not self._input:
                    if self._failure is None and (self._frame is not None or not self._frames):
                        self._fail("the file ends inside a frame" if self._frame else "the file is empty", total)
                    break
            if self._frame is None:
                if self._frames and self._kind in (".gz", ".xz"):  # both allow zeros behind their last frame
                    self._input = memoryview(bytes(self._input).lstrip(b"\x00"))
                    if not self._input:
                        continue
                self._frame = _decompressor(self._kind)
                self._frames += 1
            try:
                part = self._next_part()
            except (zstandard.ZstdError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                self._fail(str(error), total)
                break
            self._step = 64 if len(part) > _BURST else _STEP[self._kind]
            if self._frame.eof:
                self._input = memoryview(self._frame.unused_data + self._input)
                self._frame = None
            if part:
                parts.append(memoryview(part))
                total += len(part)
        kept = len(parts[-1]) - max(0, total - size)
        parts[-1], self._pending = parts[-1][:kept], parts[-1][kept:]
        return b"".join(parts)

    def _holds_output(self) -> bool:
        """Whether the decompressor has more to give without new input."""
        return self._kind in _BOUNDED and self._frame is not None and not self._frame.needs_input

    def _next_part(self) -> bytes:
        if self._holds_output():
            return self._frame.decompress(b"", _BURST)
        piece, self._input = self._input[: self._step], self._input[self._step :]
        return self._frame.decompress(piece, _BURST) if self._kind in _BOUNDED else self._frame.decompress(piece)

    def _fail(self, why: str, ahead: int) -> None:
        self._failure = SourceError(
            "broken_compression",
            f"{self.path}: {self._kind} data is broken after {self.offset + ahead} decompressed bytes: {why}",
        )

    def close(self) -> None:
        self._file.close()


def _decompressor(kind: str) -> Any:
    if kind == ".zst":  # files written with `zstd --long=31` need the large window
        # Room for what a step of ordinary text becomes: the library's default is eight times that, and costs as much as
        # the decompression itself to get and give back.
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(write_size=1 << 14)
    if kind == ".gz":
        return zlib.decompressobj(wbits=31)
    if kind == ".xz":
        return lzma.LZMADecompressor(memlimit=_WINDOW)
    return bz2.BZ2Decompressor()
