"""Work on one piece: documents in, shards out, and a receipt that says what became of every line.

The result of a piece depends on the plan alone. A piece is finished when its receipt is there; it is written last.
"""

from __future__ import annotations

import errno
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import xxhash
import zstandard

from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.reading.manifest import Shard
from data_prep.reading.shards import ShardWriter, dtype_for_vocabulary
from data_prep.sources.base import Document, PieceReader, Reject
from data_prep.sources.groups import reader_for
from data_prep.tokenizers.loading import differences_from, load_tokenizer
from data_prep.tokenizing.cutting import cut
from data_prep.tokenizing.encoder import Engine
from data_prep.tokenizing.receipts import LENGTH_BINS, Receipt, receipt_path, rejects_path
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
        if engine is None:
            tokenizer = load_tokenizer(folder / plan.tokenizer.file)
            if differences_from(tokenizer, plan.tokenizer):
                raise DataError(f"{folder / plan.tokenizer.file} is not the tokenizer the plan was made with.")
            engine = Engine(tokenizer, plan.engine["name"])
        self.engine = engine
        self._reader: PieceReader | None = None

    def work(self, group: int, piece: int, cap: int = 0) -> Iterator[Progress]:
        """Do one piece, yielding after each batch; its receipt is in the working folder afterwards.

        cap: training tokens after which the piece ends (0: none).

        Raises:
            OSError: writing failed (a full disk, for example).
            DataError: a source that cannot be right, such as parquet without the text column.
        """
        found = self.plan.groups[group]
        if self._reader is None or self._reader.group is not found:
            self.close()
            self._reader = reader_for(found, self.plan.settings.options)
        reader = self._reader
        rejects = _Rejects(rejects_path(self.folder, group, piece))
        output = _Output(self.folder, self.plan, group, piece, self.engine, cap)
        try:
            with rejects, output:
                for item in reader.items(piece):
                    if isinstance(item, Document):
                        if progress := output.add(item):
                            yield progress
                            if output.capped:
                                break
                    elif isinstance(item, Reject):
                        rejects.add(item, reader.file)
                    else:
                        output.filtered[item.reason] += 1
                yield output.finish()
        finally:
            if output.capped or not output.done:
                self.close()
        receipt = Receipt(
            group,
            piece,
            reader.end_seen,
            output.shards,
            output.held_out_names,
            reader.lines,
            dict(sorted(rejects.counts.items())),
            dict(output.filtered),
            {source: counts.tolist() for source, counts in output.lengths.items()},
            output.forced_cuts,
            output.fallbacks,
            output.capped,
        )
        write_json(receipt_path(self.folder, group, piece), asdict(receipt))

    def close(self) -> None:
        """Close the file under way."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


@dataclass
class _Batch:
    """Documents of one shard that wait to be encoded together."""

    parts: list[str] = field(default_factory=list)
    continued: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # number of parts up to the end of each document
    document_bytes: list[int] = field(default_factory=list)
    bytes: int = 0


class _Output(ExitStack):
    """The shards of one piece, one per split and source; atomic as a whole only through the receipt."""

    def __init__(self, folder: Path, plan: Plan, group: int, piece: int, engine: Engine, cap: int) -> None:
        super().__init__()  # holds the open files: finishes all of them, or discards them
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
        self._batches: defaultdict[tuple[str, str], _Batch] = defaultdict(_Batch)
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._text_bytes: Counter[tuple[str, str]] = Counter()
        self._held_out: dict[str, Any] = {}
        self._waiting = 0
        self._train_tokens = 0

    def add(self, document: Document) -> Progress | None:
        """Take a document; returns progress when a batch was encoded."""
        text, data = document.text, document.data
        size = len(data)
        options = self.settings.options
        if size < options.minimum_bytes or (options.maximum_bytes and size > options.maximum_bytes):
            self.filtered["length"] += 1
            return None
        split = self._split(xxhash.xxh3_64_intdigest(data, self.settings.split_seed))
        source = document.subset or self.source
        if split != "train":
            line = {"text": text, "source": source}
            self._held(split).write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        key = (split, source)
        batch = self._batches[key]
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

    def finish(self) -> Progress:
        """Encode what waits and give every file its name."""
        steps = [self._flush(key) for key in list(self._batches)]
        self.close()
        for (split, source), writer in sorted(self._writers.items()):
            made, size = writer.summary, self._text_bytes[split, source]
            shard = Shard(made.name, made.tokens, made.documents, size, made.sha256_bin, made.sha256_idx, source)
            self.shards.setdefault(split, []).append(shard)
        self.fallbacks = self.engine.fallbacks - self.fallbacks
        self.done = True
        return Progress(*(sum(getattr(s, n) for s in steps) for n in ("documents", "tokens", "text_bytes")))

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
            counts = self.lengths.setdefault(key[1], np.zeros(LENGTH_BINS, np.int64))
            counts += np.bincount(np.log2(lengths).astype(np.int64), minlength=LENGTH_BINS)
        return Progress(lengths.size, out.size, int(texts.sum()))

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
                self._writers[key] = self.enter_context(ShardWriter(self.folder / name, self.dtype))
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

    def _held(self, split: str) -> Any:
        """Where the raw text of held-out documents is written."""
        if split not in self._held_out:
            name = f"held_out-{split}-{self.group:05d}-{self.piece:05d}.jsonl.zst"
            raw = self.enter_context(atomic_write(self.folder / WORK / name))
            packer = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
            self._held_out[split] = self.enter_context(packer)
            self.held_out_names[split] = name
        return self._held_out[split]


class _Rejects(ExitStack):
    """The list of what a piece left out, written as it grows, and the counts of it."""

    def __init__(self, path: Path) -> None:
        super().__init__()  # holds the open file
        self.path = path
        self.counts: Counter[str] = Counter()
        self._stream: IO[bytes] | None = None
        path.unlink(missing_ok=True)

    def add(self, reject: Reject, file: str) -> None:
        if self._stream is None:
            self._stream = self.enter_context(atomic_write(self.path))
        self.counts[reject.reason] += 1
        if self.counts[reject.reason] <= _LISTED:  # a small file can be packed to billions of lines
            line = {"file": file, "line": reject.line, "reason": reject.reason, "detail": reject.detail}
            self._stream.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
