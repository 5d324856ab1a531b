"""Token files of other stacks, made into a data set folder.

    megatron    NAME.bin and NAME.idx of Megatron-LM or GPT-NeoX
    datatrove   NAME.ds, raw ids, with NAME.ds.index, uint64 ends of the documents in ids
    nanogpt     NAME.bin, raw ids
    olmo        NAME.npy, raw ids without numpy's header (one with it is taken as well)

Raw ids do not say how wide they are: uint16 where the vocabulary fits it and uint32 otherwise, unless `dtype` names
another. A file that can be read as wider ids is refused until it does, and so is one that begins like another format.

Documents end where the index says and after every END_OF_DOCUMENT. A document without END_OF_DOCUMENT gets one; empty
documents are left out and counted. Ids are not changed, so the tokenizer must be the one that made them.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.interchange.file_formats import refuse_other_format
from data_prep.paths import FileIdentity, identity, new_folder
from data_prep.reading.manifest import SPLITS, Manifest, Split, write_manifest
from data_prep.reading.manifest import Shard as ShardEntry
from data_prep.reading.shards import Shard, ShardWriter, bin_path, dtype_for_vocabulary, idx_path
from data_prep.reading.verify import index_problems_of
from data_prep.tokenizers.base import Tokenizer, TokenizerInfo
from data_prep.tokenizers.loading import copy_tokenizer, load_tokenizer

_PIECE = 1 << 22  # ids in memory at a time
_WIDTHS = ("uint16", "uint32", "uint64")


# Ids of another stack's file, and where its documents end (rising, in ids; empty where the file does not say).
TokenFile = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote. unended: documents that got their END_OF_DOCUMENT; empty: documents left out."""

    manifest: Manifest
    unended: int
    empty: int
    sample: str


def import_files(
    kind: str,
    files: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    eod: str = "",
    dtype: str = "",
    progress: Callable[[str, int], None] = lambda _shard, _ids: None,
) -> ImportReport:
    """Write the files as a data set folder, one shard each.

    There is no raw text, so the folder has no held-out text and counts 0 text bytes.

    Args:
        kind: `megatron`, `datatrove`, `nanogpt` or `olmo`.
        files: `[SPLIT=]PATH`; the split is `train` unless named.
        out: a new folder.
        tokenizer: that made the ids, as for `load_tokenizer`.
        eod: END_OF_DOCUMENT token, where the tokenizer does not say.
        dtype: of the ids of `nanogpt` and `olmo` files (uint16, uint32 or uint64); by default uint16 where the
            vocabulary fits it, uint32 otherwise.
        progress: called with the name of the shard and the number of ids done.

    Raises:
        DataError: files that are missing, damaged or given twice, raw ids of another or an uncertain width, ids outside
            the tokenizer's vocabulary, `out` not empty.
    """
    if kind not in READERS:
        raise DataError(f"there is no import of {kind!r}; known are {', '.join(READERS)}.")
    if dtype and kind not in ("nanogpt", "olmo"):
        raise DataError(f"--dtype {dtype}: {kind} files say themselves how wide their ids are; leave it out.")
    folder = new_folder(out)
    loaded = load_tokenizer(tokenizer, eod)
    placed = [_split_and_path(file) for file in files]
    _refuse_repeated([path for _, path in placed], kind)
    opened = [READERS[kind](path, _Raw(dtype, loaded.vocab_size)) for _, path in placed]
    entries: dict[str, list[ShardEntry]] = {}
    unended = empty = 0
    try:
        for (split, path), source in zip(placed, opened):
            of_split = entries.setdefault(split, [])
            copy = _Copy(path, loaded)
            of_split.append(copy.run(source, folder / f"{split}-{len(of_split):05d}", progress))
            unended += copy.unended
            empty += copy.empty
        manifest = _manifest(folder, kind, placed, loaded, entries, empty)
    except BaseException:
        for entry in chain.from_iterable(entries.values()):
            bin_path(folder / entry.name).unlink()
            idx_path(folder / entry.name).unlink()
        raise
    write_manifest(folder, manifest)
    first = opened[0][0][:64].astype(np.int64).tolist()
    return ImportReport(manifest, unended, empty, loaded.decode(first))


def _manifest(
    folder: Path,
    kind: str,
    placed: Sequence[tuple[str, Path]],
    tokenizer: Tokenizer,
    entries: dict[str, list[ShardEntry]],
    empty: int,
) -> Manifest:
    file = copy_tokenizer(tokenizer, folder / "tokenizer")
    shards = list(chain.from_iterable(entries.values()))
    return Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, f"tokenizer/{file}"
        ),
        dtype=dtype_for_vocabulary(tokenizer.vocab_size).name,
        splits={split: Split(tuple(entries[split])) for split in SPLITS if entries.get(split)},
        sources=[
            {
                "name": name,
                "documents": sum(entry.documents for entry in shards if entry.source == name),
                "tokens": sum(entry.tokens for entry in shards if entry.source == name),
                "text_bytes": 0,
            }
            for name in dict.fromkeys(entry.source for entry in shards)
        ],
        settings={"imported": kind, "files": [f"{split}={path.name}" for split, path in placed]},
        rejects={"empty_document": empty} if empty else {},
        statistics={"lengths_log2": _lengths(folder, shards)},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=importlib.metadata.version("mor-pretrain"),
    )


def _lengths(folder: Path, shards: Sequence[ShardEntry]) -> dict[str, list[int]]:
    """Documents of each source by power of two of their tokens."""
    counts: dict[str, np.ndarray] = {}
    for entry in shards:
        lengths = Shard(folder / entry.name).lengths
        found = counts.setdefault(entry.source, np.zeros(32, np.int64))
        for start in range(0, lengths.size, _PIECE):
            found += np.bincount(np.log2(lengths[start : start + _PIECE]).astype(np.int64), minlength=32)
    return {source: np.trim_zeros(found, "b").tolist() for source, found in counts.items()}


def _split_and_path(file: str) -> tuple[str, Path]:
    split, equals, path = file.partition("=")
    if equals and split in SPLITS and not os.path.exists(file):
        return split, Path(path)
    return "train", Path(file)


def _refuse_repeated(paths: Sequence[Path], kind: str) -> None:
    seen: dict[FileIdentity, Path] = {}
    for path in paths:
        first = seen.setdefault(identity(Shard(path).bin if kind == "megatron" else path), path)
        if first is not path:
            again = str(path) if path == first else f"{path}, the same file as {first},"
            raise DataError(f"{again} is given twice; its documents would be in the data set twice.")


class _Raw:
    """What is known of raw ids before they are read: the width that was asked for, and the size of the vocabulary."""

    def __init__(self, name: str, vocabulary: int) -> None:
        if name and name not in _WIDTHS:
            raise DataError(f"raw ids are {', '.join(_WIDTHS)}, not {name!r}.")
        self.name, self.vocabulary = name, vocabulary

    def ids(self, path: Path) -> np.ndarray:
        """The ids of a file without a header.

        Raises:
            DataError: another format, no whole number of ids, or ids that may be wider than they were taken for.
        """
        refuse_other_format(path)
        dtype = np.dtype(self.name or ("uint16" if self.vocabulary <= 1 << 16 else "uint32")).newbyteorder("<")
        ids = _mapped(path, dtype)
        wider = [name for name in _WIDTHS if np.dtype(name).itemsize > dtype.itemsize and self._fits(path, name)]
        if wider and not self.name:
            zeros = "every second" if np.dtype(wider[-1]).itemsize == 2 * dtype.itemsize else "three of four"
            raise DataError(
                f"{path} can be read as {dtype.name} and as {wider[-1]} ids of this vocabulary; as {dtype.name}, "
                f"{zeros} would be 0. Say which they are: --dtype {wider[-1]} (more likely) or --dtype {dtype.name}."
            )
        return ids

    def _fits(self, path: Path, name: str) -> bool:
        """Whether the beginning of the file, read so, is ids of the vocabulary throughout."""
        if _size(path) % np.dtype(name).itemsize:
            return False
        return bool((_mapped(path, np.dtype(name).newbyteorder("<"))[:_PIECE] < self.vocabulary).all())


class _Copy:
    """Copies the ids of one file into a shard, piece by piece, and sets the ends of documents right."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.path, self.eod, self.vocabulary = path, tokenizer.eod_id, tokenizer.vocab_size
        self.unended = self.empty = 0

    def run(self, source: TokenFile, prefix: Path, progress: Callable[[str, int], None]) -> ShardEntry:
        """Copy everything."""
        ids, given = source
        ends = np.unique(given)
        self.empty += given.size - int(np.count_nonzero(ends))
        last = self.eod  # the id before the piece
        with ShardWriter(prefix, dtype_for_vocabulary(self.vocabulary)) as writer:
            for start in range(0, ids.size, _PIECE):
                piece = ids[start : start + _PIECE]
                lowest, highest = piece.min(), piece.max()
                if not 0 <= lowest <= highest < self.vocabulary:
                    raise DataError(
                        f"{self.path} holds ids from {lowest} to {highest}, but the tokenizer has {self.vocabulary}; "
                        "name the tokenizer that made the file, and for raw ids their --dtype."
                    )
                first, end = np.searchsorted(ends, (start, start + piece.size), side="right")
                last = self._write(piece.astype(writer.dtype), ends[first:end] - start, last, writer)
                progress(prefix.name, start + piece.size)
            if last != self.eod:
                writer.extend([self.eod])
                writer.end_document()
                self.unended += 1
            if not writer.documents:
                raise DataError(f"{self.path} holds no document.")
        return ShardEntry(**asdict(writer.summary), text_bytes=0, source=self.path.name.split(".")[0])

    def _write(self, ids: np.ndarray, ends: np.ndarray, last: int, writer: ShardWriter) -> int:
        """Write ids that follow the id `last`, with documents that end at `ends`; returns the last id written."""
        unended = ends[ids[ends - 1] != self.eod]
        self.unended += unended.size
        ids = np.insert(ids, unended, self.eod)
        empty = (ids == self.eod) & (np.append(last, ids[:-1]) == self.eod)  # END_OF_DOCUMENT alone
        self.empty += int(np.count_nonzero(empty))
        ids = ids[~empty]
        stops = np.flatnonzero(ids == self.eod) + 1
        whole = 0
        if stops.size:
            # The first document may have begun in an earlier piece.
            writer.extend(ids[: stops[0]])
            writer.end_document()
            whole = int(stops[-1])
            writer.write(ids[stops[0] : whole], np.diff(stops))
        if whole < ids.size:
            writer.extend(ids[whole:])
        return int(ids[-1]) if ids.size else last


def _read_megatron(path: Path, _raw: _Raw) -> TokenFile:
    shard = Shard(path)
    for problem in index_problems_of(shard):
        raise DataError(f"{problem} The documents of such a file cannot be imported in order.")
    lengths = shard.lengths.astype(np.int64)
    return shard.tokens, np.append(0, np.cumsum(lengths))[shard.document_index][1:]


def _read_datatrove(path: Path, _raw: _Raw) -> TokenFile:
    refuse_other_format(path)
    index = Path(f"{path}.index")
    ends = _mapped(index, np.dtype("<u8"))
    size = _size(path)
    total = int(ends[-1]) if ends.size else 0
    width = size // total if total and size % total == 0 else 0
    if width not in (2, 4) or (np.diff(ends.astype(np.int64), prepend=0) < 0).any():
        raise DataError(
            f"{path} has {size} bytes, which are not 2 or 4 for each of the {total} ids at which {index.name} ends."
        )
    return _mapped(path, np.dtype(f"<u{width}")), ends.astype(np.int64)


def _read_raw(path: Path, raw: _Raw) -> TokenFile:
    return raw.ids(path), np.empty(0, np.int64)


def _read_olmo(path: Path, raw: _Raw) -> TokenFile:
    if _size(path) and path.open("rb").read(6) == b"\x93NUMPY":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, so damage raises many kinds
            raise DataError(f"{path} begins like a numpy file but cannot be read as one: {error}.") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{path} holds {ids.dtype.name} of shape {ids.shape}; expected a flat array of integers.")
        if raw.name not in ("", ids.dtype.name):
            raise DataError(f"{path} says itself that its ids are {ids.dtype.name}; leave out --dtype {raw.name}.")
        return ids, np.empty(0, np.int64)
    return _read_raw(path, raw)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = _size(path)
    if not size or size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, which is no whole number of {dtype.name} values above none.")
    return np.memmap(path, dtype, "r")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


READERS: dict[str, Callable[[Path, _Raw], TokenFile]] = {
    "megatron": _read_megatron,
    "datatrove": _read_datatrove,
    "nanogpt": _read_raw,
    "olmo": _read_olmo,
}
