"""Lines of a stream, found by where they start, so that any number of readers share a file without talking."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.sources.base import MAXIMUM, Group, PieceReader, ReadOptions, SourceError
from data_prep.sources.streams import ByteStream

_CHUNK = 1 << 20
_LARGEST_CHUNK = 8 << 20


class LongLine:
    """Stands for a line above `MAXIMUM` bytes, which was skipped; its length is that of the line."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


class LineReader:
    """Yields the lines that start inside a range of (decompressed) bytes.

    A line belongs to the range that holds its first byte. Ranges asked for in rising order continue where the last
    one ended; on a compressed file a gap is decompressed and dropped.

    Args:
        path: the file.
        separator: what ends a line. Ranges other than the whole file need one that cannot overlap with itself.

    Raises:
        SourceError: the file cannot be opened.
    """

    def __init__(self, path: str, separator: bytes = b"\n") -> None:
        self.path, self.separator = path, separator
        self.stream = ByteStream(path)
        self.offset = 0  # where the next line starts
        self.at_end = False
        self._passed = 0  # lines in front of this byte were asked for
        self._ready: list[bytes | LongLine] = []  # whole lines already split, the next one last
        self._carry = b""  # what follows them, up to the reading position of the stream

    def lines(self, start: int, end: int | None) -> Iterator[bytes | LongLine]:
        """Lines whose first byte is in [start, end); `end` None reads to the end of the file.

        Damage before the range's first line is reported by an earlier range; then there are no lines here.

        Raises:
            SourceError: damage inside the range, after the lines in front of it were yielded.
        """
        if start < self._passed:
            self.stream.close()
            self.stream = ByteStream(self.path)
            self.offset, self.at_end, self._ready, self._carry = 0, False, [], b""
        # A line that began in front of `end` may reach far behind it: the next range has nothing to look for there.
        self._passed = end if end is not None else start + 1
        if start > self.offset:
            try:
                self._skip_to(start)
            except SourceError:
                self.at_end = True
        width = len(self.separator)
        while (end is None or self.offset < end) and (self._ready or self._fill()):
            line = self._ready.pop()
            self.offset += len(line) + width
            yield line if len(line) <= MAXIMUM else LongLine(len(line))
        if not self._ready and not self._carry and not self.at_end:
            try:
                self._fill()
            except SourceError:
                return  # the next range reports it
        self.at_end = self.at_end and not self._ready

    def _skip_to(self, start: int) -> None:
        """Go to the first line that starts at or after `start`."""
        width = len(self.separator)
        while self._ready and self.offset < start:
            self.offset += len(self._ready.pop()) + width
        if self._ready or self.offset >= start:
            return
        # A separator that ends exactly at `start` makes a line start there, so reading begins in front of it.
        position = max(self.offset, start - width)
        if position <= self.stream.offset:
            data = self._carry[position - (self.stream.offset - len(self._carry)) :]
        else:
            self.stream.seek(position)
            data = b""
        self._carry = b""
        self.offset = position + self._pass_separator(data)
        if not self.at_end:
            self.offset += width

    def _fill(self) -> bool:
        """Read on until at least one whole line is there; False at the end of the file."""
        if self.at_end:
            return False
        data = self._carry
        while self.separator not in data:
            if len(data) - len(self.separator) >= MAXIMUM:  # the separator may have begun
                self._ready = [LongLine(self._pass_separator(data))]
                return True
            # Larger and larger reads: a line of many megabytes is not copied once for each of them.
            chunk = self.stream.read(min(max(_CHUNK, len(data)), _LARGEST_CHUNK))
            if not chunk:
                self.at_end, self._carry = True, b""
                self._ready = [data] if data else []
                return bool(data)
            data = data + chunk if data else chunk
        *lines, self._carry = data.split(self.separator)
        lines.reverse()
        self._ready = lines  # type: ignore[assignment]
        return True

    def _pass_separator(self, data: bytes) -> int:
        """Read on behind the next separator, of which `data` is read; bytes in front of it. Nothing else is kept."""
        passed = 0
        while (found := data.find(self.separator)) < 0:
            kept = min(len(data), len(self.separator) - 1)  # a separator may begin here
            passed += len(data) - kept
            chunk = self.stream.read(_CHUNK)
            if not chunk:
                self.at_end, self._carry = True, b""
                return passed + kept
            data = data[len(data) - kept :] + chunk
        self._carry = data[found + len(self.separator) :]
        return passed + found


class LinePieceReader(PieceReader):
    """Base of the readers whose pieces are ranges of lines."""

    def __init__(self, group: Group, options: ReadOptions) -> None:
        super().__init__(group, options)
        self._lines: LineReader | None = None

    def lines_of(self, path: str, piece: int, separator: bytes = b"\n") -> Iterator[bytes | LongLine]:
        """Lines of a piece of a file, counted in `lines`."""
        if self._lines is None or self._lines.path != path:
            self.close()
            self._lines = LineReader(path, separator)
        size = self.group.piece_bytes
        start, end = (0, None) if self.group.pieces == 1 else (piece * size, (piece + 1) * size)
        for line in self._lines.lines(start, end):
            self.lines += 1
            yield line

    def at_end(self) -> bool:
        return self._lines is None or self._lines.at_end

    def close(self) -> None:
        if self._lines is not None:
            self._lines.stream.close()
            self._lines = None


def can_overlap(separator: bytes) -> bool:
    """Whether two occurrences of `separator` can share bytes; then where one starts depends on what stands before."""
    return any(separator[:n] == separator[-n:] for n in range(1, len(separator)))
