"""Corpora for the tools that look at every document: reading, working in several processes, writing again."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import orjson
import zstandard

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.paths import new_folder
from data_prep.sources.base import Document, ReadOptions, Reject, field_path, record_head
from data_prep.sources.find import UNFINISHED, find_sources, with_standard_input
from data_prep.sources.groups import plan_groups, reader_for
from data_prep.sources.notices import notices

_BATCH = 2 << 20  # characters of text that a worker takes at a time
_PART = 1 << 30  # bytes of text in one written file

S = TypeVar("S")
T = TypeVar("T")


class Entry(NamedTuple):
    """One document: its number in the corpus, where it was found, its text, and the other fields of its record
    (`data_prep.sources.base.record_head`).
    """

    number: int
    source: str
    file: str
    line: int
    subset: str | None
    text: str
    head: bytes = b""

    @property
    def place(self) -> str:
        """File and line, for reports."""
        return f"{self.file}:{self.line}"


class CorpusReader:
    """The documents of some sources, in the order given; can be read more than once, standard input too.

    Attributes:
        notices: sentences for a person, about what was left out and what is probably meant otherwise.
        rejects: number of what could not be read, by reason, from the last time the corpus was read.
        examples: the first hundred of them.

    Args:
        scratch: folder for a copy of standard input, made when missing. The system's own, the default, is often too
            small.

    Raises:
        DataError: a source that does not exist.
    """

    def __init__(self, specifications: Sequence[str], options: ReadOptions, scratch: Path | None = None) -> None:
        self.options = options
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".data-prep-", dir=scratch)
        sources, left_out = find_sources(specifications, options)
        self.notices = [*left_out, *notices(sources, options)]
        sources = with_standard_input(sources, Path(self._scratch.name))
        self._groups = plan_groups(sources, options, 1 << 60)  # every file in one piece: these tools read in order
        self._files = self._files_now()
        self.rejects: Counter[str] = Counter()
        self.examples: list[str] = []

    def __iter__(self) -> Iterator[Entry]:
        self.rejects.clear()
        self.examples.clear()
        number = 0
        for group in self._groups:
            with closing(reader_for(group, self.options)) as reader:
                reader.keep_fields = True
                for item in reader.all_items():
                    if isinstance(item, Reject):
                        self.rejects[item.reason] += 1
                        if len(self.examples) < 100:
                            self.examples.append(f"{reader.file}:{item.line}: {item.reason}: {item.detail}")
                    elif isinstance(item, Document):
                        yield Entry(number, group.source, reader.file, item.line, item.subset, item.text, item.head)
                        number += 1

    def refuse_changed_files(self) -> None:
        """Check, after a second reading, that it read what the first one did.

        Raises:
            DataError: a file has another size or time of change than when this reader was made.
        """
        for path in (path for path, now in self._files_now().items() if now != self._files[path]):
            raise DataError(f"{path} was changed while it was read; run the command again when nothing writes it.")

    def _files_now(self) -> dict[str, tuple[int, int] | None]:
        found = {path: Path(path) for group in self._groups for path in group.files}
        return {p: (f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for p, f in found.items()}


def map_entries(
    entries: Iterable[Entry], work: Callable[[S, list[Entry]], Sequence[T]], workers: int, shared: S
) -> Iterator[tuple[Entry, T]]:
    """Each entry with what `work` made of it, in order; memory holds a few batches for each worker.

    Args:
        work: takes `shared` and a batch of entries, and returns one result for each entry; a function of a module.
        workers: processes; 1 works in this one.
        shared: what every call needs; each process gets it once.

    Raises:
        DataError: a process was killed.
    """
    if workers == 1:
        for batch in _batches(entries):
            yield from zip(batch, work(shared, batch))
        return
    waiting: deque[tuple[list[Entry], Future[Sequence[T]]]] = deque()
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _keep, (shared,)) as pool:
            for batch in _batches(entries):
                waiting.append((batch, pool.submit(_run, work, batch)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result())
            for done, future in waiting:
                yield from zip(done, future.result())
    except BrokenProcessPool:
        raise DataError(
            "a process that looks at documents was killed; out of memory is the usual reason: use fewer --workers, and "
            "a new --out or this one emptied."
        ) from None


_kept: Any = None  # in a worker process: what all calls share


def _keep(shared: Any) -> None:
    global _kept
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _kept = shared


def _run(work: Callable[[Any, list[Entry]], Sequence[T]], batch: list[Entry]) -> Sequence[T]:
    return work(_kept, batch)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.head) + len(entry.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class CorpusWriter:
    """Writes documents as `<source>-00000.jsonl.zst`, 1 GB of text each, with all fields that they were read with.

    As a context manager it gives the files their names at the end of the block, and removes them when it raises.

    Raises:
        DataError: the folder exists and is not empty.
    """

    def __init__(self, folder: str | os.PathLike[str], options: ReadOptions) -> None:
        self.folder = new_folder(folder)
        path = field_path(options.text_field)
        self._bare, self._end = record_head({}, path), b'"' + b"}" * len(path) + b"\n"
        self._parts: dict[str, _Part] = {}
        self._numbers: Counter[str] = Counter()
        self._finished: list[Path] = []
        self.documents = 0
        self.text_bytes = 0

    def write(self, entry: Entry) -> None:
        """Append a document to its source's file."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", entry.source).strip("._") or "source"
        part = self._parts.get(name)
        if part is None:
            path = self.folder / f"{name}-{self._numbers[name]:05d}.jsonl.zst"
            part = self._parts[name] = _Part(path)
            self._numbers[name] += 1
        part.stream.write((entry.head or self._bare) + orjson.dumps(entry.text)[1:-1] + self._end)
        size = len(entry.text.encode())
        part.text_bytes += size
        self.text_bytes += size
        self.documents += 1
        if part.text_bytes >= _PART:
            self._parts.pop(name).files.close()
            self._finished.append(part.path)

    def __enter__(self) -> CorpusWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / UNFINISHED).touch()  # so that a part of the corpus is not read as the whole
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts.values():
            part.files.__exit__(kind, error, trace)
        if kind is not None:
            for path in self._finished:
                path.unlink(missing_ok=True)
        (self.folder / UNFINISHED).unlink(missing_ok=True)


class _Part:
    """One file being written; it appears under its name when `files` is left without an error."""

    def __init__(self, path: Path) -> None:
        self.path, self.text_bytes = path, 0
        self.files = ExitStack()
        raw = self.files.enter_context(atomic_write(path))
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self.stream = self.files.enter_context(compressor.stream_writer(raw, closefd=False))


@contextmanager
def removed_documents(folder: Path) -> Iterator[Callable[[dict[str, object]], object]]:
    """Yields a function that adds a line to `removed.jsonl.zst`; the file appears at the end of the block."""
    compressor = zstandard.ZstdCompressor()
    with atomic_write(folder / "removed.jsonl.zst") as raw, compressor.stream_writer(raw, closefd=False) as stream:
        yield lambda line: stream.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
