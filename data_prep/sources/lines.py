"""Lines of a stream, found by where they start, so that any number of readers share a file without talking."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.sources.base import LARGE, SourceError
from data_prep.sources.streams import ByteStream

_CHUNK = 1 << 20


class LongLine:
    """A line above the size that is held in memory, to be read in parts before the next line is asked for; what is left
    unread is skipped then.
    """

    def __init__(self, reader: LineReader, head: bytes) -> None:
        self._reader, self._data = reader, head
        self._ended = False
        self._passed = 0

    def read(self) -> bytes:
        """The next part, without the separator; empty at the end of the line.

        Raises:
            SourceError: the file is damaged here.
        """
        part = b""
        while not part and not self._ended:
            part, self._data, self._ended = self._reader.part_of_line(self._data)
        self._passed += len(part)
        return part

    def skip(self) -> int:
        """Read to the end; bytes of the whole line.

        Raises:
            SourceError: the file is damaged inside the line.
        """
        while self.read():
            pass
        return self._passed


class LineReader:
    """Yields the lines that start inside a range of (decompressed) bytes.

    A line belongs to the range that its first byte lies in. Ranges asked for in rising order continue where the last
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
        self._open: LongLine | None = None  # handed out, and perhaps not read to its end

    def lines(self, start: int, end: int | None) -> Iterator[bytes | LongLine]:
        """Lines whose first byte lies in [start, end); `end` None reads to the end of the file.

        Damage in front of the range's first line is the concern of an earlier range: then there are no lines here.

        Raises:
            SourceError: damage inside the range, after the lines in front of it were yielded.
        """
        if start < self._passed:
            self.stream.close()
            self.stream = ByteStream(self.path)
            self.offset, self.at_end, self._ready, self._carry, self._open = 0, False, [], b"", None
        # A line that began in front of `end` may reach far behind it: the next range has nothing to look for there.
        self._passed = end if end is not None else start + 1
        try:
            self._leave_open_line()
            if start > self.offset:
                self._skip_to(start)
        except SourceError:
            self.at_end, self._open = True, None
        width = len(self.separator)
        while end is None or self.offset < end:
            if not self._ready and not self._fill():
                break
            line = self._ready.pop()
            if isinstance(line, LongLine):
                self._open = line
                yield line
                self._leave_open_line()
            else:
                self.offset += len(line) + width
                yield line
        if not self._ready and not self._carry and not self.at_end:
            try:
                self._fill()
            except SourceError:
                return  # the next range meets it again and reports it
        self.at_end = self.at_end and not self._ready

    def _skip_to(self, start: int) -> None:
        """Go to the first line that starts at or after `start`."""
        width = len(self.separator)
        while self._ready and self.offset < start:
            line = self._ready.pop()
            self.offset += (line.skip() if isinstance(line, LongLine) else len(line)) + width
        if self._ready or self.offset >= start:
            return
        # A separator that ends exactly at `start` makes a line start there, so reading begins in front of it.
        position = max(self.offset, start - width)
        if position <= self.stream.offset:
            data = self._carry[position - (self.stream.offset - len(self._carry)) :]
        else:
            self.stream.seek(position)
            data = b""
        base = position
        self._carry = b""
        while True:
            found = data.find(self.separator)
            if found >= 0:
                self._carry = data[found + width :]
                self.offset = base + found + width
                return
            keep = min(len(data), width - 1)
            base += len(data) - keep
            chunk = self.stream.read(_CHUNK)
            if not chunk:
                self.offset, self.at_end = self.stream.offset, True
                return
            data = data[len(data) - keep :] + chunk

    def _fill(self) -> bool:
        """Read on until at least one whole line is there; False at the end of the file."""
        if self.at_end:
            return False
        data = self._carry
        while self.separator not in data:
            if len(data) > LARGE:
                self._carry, self._ready = b"", [LongLine(self, data)]
                return True
            chunk = self.stream.read(_CHUNK)
            if not chunk:
                self.at_end, self._carry = True, b""
                self._ready = [data] if data else []
                return bool(data)
            data = data + chunk if data else chunk
        *lines, self._carry = data.split(self.separator)
        lines.reverse()
        self._ready = lines  # type: ignore[assignment]
        return True

    def part_of_line(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """A part of a long line, of which `data` is read: the part, what is read and not part of it, whether it is the
        last. What follows the line is kept for the next one.
        """
        found = data.find(self.separator)
        if found >= 0:
            self._carry = data[found + len(self.separator) :]
            return data[:found], b"", True
        cut = max(0, len(data) - (len(self.separator) - 1))  # a separator may begin behind it
        if cut:
            return data[:cut], data[cut:], False
        chunk = self.stream.read(_CHUNK)
        if not chunk:
            self.at_end = True
            return data, b"", True
        return b"", data + chunk, False

    def _leave_open_line(self) -> None:
        """Go behind the long line that was handed out last."""
        if self._open is not None:
            size = self._open.skip()
            self.offset += size + len(self.separator)
            self._open = None


def can_overlap(separator: bytes) -> bool:
    """Whether two occurrences of `separator` can share bytes; then where one starts depends on what stands before."""
    return any(separator[:n] == separator[-n:] for n in range(1, len(separator)))
