"""Work on one piece: documents in, shards out, and a receipt that says what became of every line.

The result of a piece depends on the plan alone. A piece is finished when its receipt is there; it is written last.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import xxhash
import zstandard

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.reading.manifest import Shard
from data_prep.reading.shards import ShardWriter, dtype_for_vocabulary
from data_prep.sources.base import Document, Filtered, LargeDocument, PieceReader, Reject, SourceError
from data_prep.sources.groups import reader_for
from data_prep.tokenizers.loading import differences_from, load_tokenizer
from data_prep.tokenizing.cutting import Cutter, cut
from data_prep.tokenizing.encoder import Engine
from data_prep.tokenizing.receipts import LENGTH_BINS, Receipt, rejects_path, write_receipt
from data_prep.tokenizing.shard_plan import WORK, Plan, Settings

_FLUSH = 1 << 20  # bytes of text of one shard that are encoded together
_HELD = 8 << 20  # bytes of text that wait in all
_LONGEST_NAME = 80  # characters of a subset's name in the name of a shard
_LISTED = 100_000  # rejects of a piece that are listed for each reason; all are counted


@dataclass
class Progress:
    """How far a worker is: what it added since its last report."""

    documents: int
    tokens: int
    text_bytes: int


class PieceWorker:
    """Works on pieces, one after another, keeping the tokenizer loaded and the file under way open."""

    def __init__(self, folder: Path, plan: Plan, engine: Engine | None = None) -> None:
        self.folder, self.plan = folder, plan
        self.scratch = folder / WORK
        if engine is None:
            tokenizer = load_tokenizer(folder / plan.tokenizer.file)
            if differences_from(tokenizer, plan.tokenizer):
                raise DataError(f"{folder / plan.tokenizer.file} is not the tokenizer the plan was made with.")
            engine = Engine(tokenizer, plan.engine["name"])
        self.engine = engine
        self._reader: PieceReader | None = None

    def work(self, group: int, piece: int, cap: int = 0) -> Iterator[Progress]:
        """Do one piece, yielding after each batch; its receipt lies in the working folder afterwards.

        cap: training tokens after which the piece ends (0: none).

        Raises:
            OSError: writing failed (a full disk, for example).
            DataError: a source that cannot be right, such as parquet without the text column.
        """
        found = self.plan.groups[group]
        rejects = _Rejects(rejects_path(self.folder, group, piece))
        output = _Output(self.folder, self.plan, group, piece, self.engine, cap)
        reader: PieceReader | None = None
        try:
            with output:
                try:
                    if self._reader is None or self._reader.group is not found:
                        self.close()
                        self._reader = reader_for(found, self.plan.settings.options, self.scratch)
                    reader = self._reader
                    for item in reader.items(piece):
                        if isinstance(item, Document):
                            progress = output.add(item)
                            if progress:
                                yield progress
                                if output.capped:
                                    break
                        elif isinstance(item, Reject):
                            rejects.add(item, reader.file)
                        elif isinstance(item, Filtered):
                            output.filtered[item.reason] += 1
                        else:
                            yield from output.add_large(item)
                            if output.capped:
                                break
                        if output.reject:
                            rejects.add(output.reject, reader.file)
                            output.reject = None
                except SourceError as error:
                    files = reader.file if reader else found.files[0]
                    rejects.add(Reject(error.reason, reader.lines if reader else 0, str(error)), files)
                    last = True
                else:
                    last = reader.end_seen
                yield output.finish()
            rejects.close()
        except BaseException:
            rejects.abort()
            raise
        finally:
            if reader is None or output.capped or not output.done:
                self.close()
        receipt = Receipt(
            group,
            piece,
            last,
            output.shards,
            output.held_out_names,
            reader.lines if reader else 0,
            dict(sorted(rejects.counts.items())),
            dict(output.filtered),
            {source: counts.tolist() for source, counts in output.lengths.items()},
            output.forced_cuts,
            output.fallbacks,
            output.capped,
        )
        write_receipt(self.folder, receipt)

    def close(self) -> None:
        """Close the file under way."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Batch:
    """Documents of one shard that wait to be encoded together."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.continued: list[int] = []
        self.ends: list[int] = []  # number of parts up to the end of each document
        self.bytes = 0
        self.document_bytes: list[int] = []


class _Output:
    """The shards of one piece, one per split and source; atomic as a whole only through the receipt."""

    def __init__(self, folder: Path, plan: Plan, group: int, piece: int, engine: Engine, cap: int) -> None:
        self.folder, self.group, self.piece, self.engine, self.cap = folder, group, piece, engine, cap
        self.settings: Settings = plan.settings
        self.eod = plan.tokenizer.eod_id
        self.source = plan.groups[group].source
        self.dtype = dtype_for_vocabulary(plan.tokenizer.vocab_size)
        self.shards: dict[str, list[Shard]] = {}
        self.held_out_names: dict[str, str] = {}
        self.filtered: Counter[str] = Counter()
        self.lengths: dict[str, np.ndarray] = {}
        self.forced_cuts = 0
        self.fallbacks = engine.fallbacks
        self.capped = False
        self.done = False
        self.reject: Reject | None = None
        self._batches: dict[tuple[str, str], _Batch] = {}
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._text_bytes: Counter[tuple[str, str]] = Counter()
        self._held_out: dict[str, _HeldOut] = {}
        self._waiting = 0
        self._train_tokens = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for writer in self._writers.values():
                writer.abort()
            for part in self._held_out.values():
                part.abort()

    def add(self, document: Document) -> Progress | None:
        """Take a document; returns progress when a batch was encoded."""
        text, data = document.text, document.data
        size = len(data)
        if not self._wanted(size, document.line):
            return None
        split = self._split(xxhash.xxh3_64_intdigest(data, self.settings.split_seed))
        source = document.subset or self.source
        if split != "train":
            self._held(split).write_text(text, source)
        key = (split, source)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = _Batch()
        parts, forced = cut(text)
        self.forced_cuts += forced
        first = len(batch.parts)
        batch.parts += parts
        batch.continued += range(first + 1, first + len(parts))
        batch.ends.append(first + len(parts))
        batch.document_bytes.append(size)
        batch.bytes += size
        self._waiting += size
        if batch.bytes >= _FLUSH:
            return self._flush(key)
        if self._waiting >= _HELD:
            return self._flush(max(self._batches, key=lambda k: self._batches[k].bytes))
        return None

    def add_large(self, document: LargeDocument) -> Iterator[Progress]:
        """Take a document that is read from its file in parts."""
        try:
            size = document.end - document.start
            if not self._wanted(size, document.line):
                return
            digest = xxhash.xxh3_64(seed=self.settings.split_seed)
            for chunk in _chunks(document):
                digest.update(chunk)
            split = self._split(digest.intdigest())
            source = document.subset or self.source
            key = (split, source)
            if key in self._batches:
                yield self._flush(key)
            if split != "train":
                self._held(split).write_file(document, source)
            writer = self._writer(key)
            cutter, decoder, tokens = Cutter(), _utf8_decoder(), 0
            first = True
            for place in [*_chunk_ranges(document), None]:
                if place is None:
                    parts = [*cutter.feed(decoder.decode(b"", final=True)), *cutter.finish()]
                else:
                    parts = list(cutter.feed(decoder.decode(_read(document.path, *place))))
                for part in parts:
                    ids, _ = self.engine.encode([part], () if first else (0,))
                    first = False
                    if self.cap and split == "train" and self._train_tokens + tokens + ids.size >= self.cap:
                        ids = ids[: max(0, self.cap - self._train_tokens - tokens - 1)]
                        self.capped = True
                    writer.extend(ids.astype(self.dtype))
                    tokens += ids.size
                    yield Progress(0, ids.size, len(part))
                    if self.capped:
                        break
                if self.capped:
                    break
            writer.extend(np.array([self.eod], self.dtype))
            writer.end_document()
            if split == "train":
                self._train_tokens += tokens + 1
            self.forced_cuts += cutter.forced
            self._text_bytes[key] += size
            self._count(key, np.array([tokens + 1]))
            yield Progress(1, 1, 0)
        finally:
            if document.temporary:
                document.path.unlink(missing_ok=True)

    def finish(self) -> Progress:
        """Encode what waits and give every file its name."""
        total = Progress(0, 0, 0)
        for key in list(self._batches):
            part = self._flush(key)
            total = Progress(
                total.documents + part.documents, total.tokens + part.tokens, total.text_bytes + part.text_bytes
            )
        for split, part_file in self._held_out.items():
            self.held_out_names[split] = part_file.close()
        for (split, source), writer in sorted(self._writers.items()):
            made = writer.close()
            self.shards.setdefault(split, []).append(
                Shard(
                    made.name,
                    made.tokens,
                    made.documents,
                    self._text_bytes[split, source],
                    made.sha256_bin,
                    made.sha256_idx,
                    source,
                )
            )
        self.fallbacks = self.engine.fallbacks - self.fallbacks
        self.done = True
        return total

    def _wanted(self, size: int, line: int) -> bool:
        options = self.settings.options
        if size > options.maximum_document_bytes:
            self.reject = Reject("too_long", line, f"{size} bytes; at most {options.maximum_document_bytes}")
            return False
        if size < options.minimum_bytes or (options.maximum_bytes and size > options.maximum_bytes):
            self.filtered["length"] += 1
            return False
        return True

    def _split(self, digest: int) -> str:
        share = digest / 2**64
        if share < self.settings.test:
            return "test"
        return "validation" if share < self.settings.test + self.settings.validation else "train"

    def _flush(self, key: tuple[str, str]) -> Progress:
        batch = self._batches.pop(key)
        self._waiting -= batch.bytes
        ids, starts = self.engine.encode(batch.parts, batch.continued)
        ends = starts[batch.ends]
        lengths = np.diff(ends, prepend=0) + 1
        texts = np.asarray(batch.document_bytes)
        if self.cap and key[0] == "train":
            fits = int(np.searchsorted(self._train_tokens + np.cumsum(lengths), self.cap, side="right"))
            if fits < lengths.size:
                self.capped = True
                lengths, texts, ends = lengths[:fits], texts[:fits], ends[:fits]
                ids = ids[: int(ends[-1]) if fits else 0]
            self._train_tokens += int(lengths.sum())
        out = np.insert(ids.astype(self.dtype), ends, self.eod)
        if lengths.size:
            self._writer(key).write(out, lengths)
            self._text_bytes[key] += int(texts.sum())
            self._count(key, lengths)
        return Progress(lengths.size, out.size, int(texts.sum()))

    def _count(self, key: tuple[str, str], lengths: np.ndarray) -> None:
        counts = self.lengths.setdefault(key[1], np.zeros(LENGTH_BINS, np.int64))
        counts += np.bincount(np.log2(lengths).astype(np.int64), minlength=LENGTH_BINS)

    def _writer(self, key: tuple[str, str]) -> ShardWriter:
        if key not in self._writers:
            split, source = key
            name = f"{split}-{self.group:05d}-{self.piece:05d}"
            if source != self.source:
                words = re.sub(r"[^a-z0-9]+", "_", source.lower()).strip("_") or "unnamed"
                name += f"-{words[:_LONGEST_NAME]}"
                if len(words) > _LONGEST_NAME or any(w.prefix.name == name for w in self._writers.values()):
                    name += f"-{xxhash.xxh3_64_hexdigest(source.encode())}"
            try:
                self._writers[key] = ShardWriter(self.folder / name, self.dtype)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                subsets = len({source for _, source in self._writers})
                raise DataError(
                    f"the field {self.settings.options.subset_field!r} names more than {subsets} subsets in one piece, "
                    "and each is a shard of its own: this process may not open more files (`ulimit -n`). Is another "
                    "field meant by --subset-field?"
                ) from None
        return self._writers[key]

    def _held(self, split: str) -> _HeldOut:
        if split not in self._held_out:
            name = f"held_out-{split}-{self.group:05d}-{self.piece:05d}.jsonl.zst"
            self._held_out[split] = _HeldOut(self.folder / WORK / name)
        return self._held_out[split]


class _HeldOut:
    """Raw text of held-out documents of one piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = atomic_write(path)
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file.__enter__(), closefd=False)

    def write_text(self, text: str, source: str) -> None:
        self._stream.write(orjson.dumps({"text": text, "source": source}, option=orjson.OPT_APPEND_NEWLINE))

    def write_file(self, document: LargeDocument, source: str) -> None:
        decoder = _utf8_decoder()
        self._stream.write(b'{"text":"')
        for chunk in _chunks(document):
            self._stream.write(orjson.dumps(decoder.decode(chunk))[1:-1])
        self._stream.write(b'","source":' + orjson.dumps(source) + b"}\n")

    def close(self) -> str:
        self._stream.close()
        self._file.__exit__(None, None, None)
        return self.path.name

    def abort(self) -> None:
        error = InterruptedError("discarded")
        self._file.__exit__(InterruptedError, error, None)


def _chunk_ranges(document: LargeDocument) -> Iterator[tuple[int, int]]:
    for at in range(document.start, document.end, 1 << 20):
        yield at, min(1 << 20, document.end - at)


def _chunks(document: LargeDocument) -> Iterator[bytes]:
    for at, size in _chunk_ranges(document):
        yield _read(document.path, at, size)


def _read(path: Path, at: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(at)
        return stream.read(size)


def _utf8_decoder() -> Any:
    return codecs.getincrementaldecoder("utf-8")()


class _Rejects:
    """The list of what a piece left out, written as it grows, and the counts of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._file: Any = None
        self._stream: IO[bytes]

    def add(self, reject: Reject, file: str) -> None:
        if self._file is None:
            self._file = atomic_write(self.path)
            self._stream = self._file.__enter__()
        self.counts[reject.reason] += 1
        if self.counts[reject.reason] > _LISTED:
            return  # a small file can be packed to billions of lines
        line = {"file": reject.file or file, "line": reject.line, "reason": reject.reason, "detail": reject.detail}
        self._stream.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        if self._file is None:
            self.path.unlink(missing_ok=True)
        else:
            self._file.__exit__(None, None, None)

    def abort(self) -> None:
        if self._file is not None:
            self._file.__exit__(InterruptedError, InterruptedError("discarded"), None)
            self._file = None


def orphaned(parent: int) -> bool:
    """Whether the process that started this one is gone."""
    return os.getppid() != parent
