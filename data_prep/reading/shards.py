"""Token shards: Megatron/NeoX indexed data sets, a `.bin` of raw token ids and an `.idx` beside it.

`.bin` holds the ids of all documents one after another, little-endian. `.idx` holds, little-endian and without padding:

    9 bytes      MMIDIDX and two zero bytes
    uint64       version, 1
    uint8        type code of the ids (1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16)
    uint64       number of sequences S
    uint64       number of document entries D (documents + 1)
    int32[S]     tokens of each sequence
    int64[S]     byte offset of each sequence in .bin
    int64[D]     index of the first sequence of each document, and S at the end

Shards written here have one sequence per document.

    with ShardWriter("out/train-00000", dtype_for_vocabulary(49152)) as writer:
        writer.write(ids, lengths)          # many whole documents, flat
    writer.summary.tokens, writer.summary.sha256_bin

    shard = Shard("out/train-00000")        # costs the same for any size; nothing is read yet but the ends of the index
    shard.tokens[10:20]                     # a view of the mapped file
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
UINT16_VOCABULARY = 65_500  # Megatron's limit, below 65,536 so that padded vocabularies still fit
LONGEST_DOCUMENT = 2**31 - 1  # tokens; the index counts them in an int32

# 6 and 7 are floats, which no ids are.
TYPE_CODES = {
    code: np.dtype(name) for code, name in zip((1, 2, 3, 4, 5, 8), ("<u1", "<i1", "<i2", "<i4", "<i8", "<u2"))
}
_CODES = {dtype: code for code, dtype in TYPE_CODES.items()}

_PIECE = 1 << 20  # entries handled at a time when an index is written


def dtype_for_vocabulary(size: int) -> np.dtype:
    """Type of the ids of a vocabulary of `size`: uint16 below 65,500, int32 otherwise (Megatron's rule)."""
    return np.dtype("<u2") if size < UINT16_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """`prefix` with `.bin` added; dots in the name stay."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """`prefix` with `.idx` added; dots in the name stay."""
    return Path(f"{os.fspath(prefix)}.idx")


@dataclass(frozen=True)
class ShardSummary:
    """What a finished shard holds: its name (without folder and suffix), counts and checksums."""

    name: str
    tokens: int
    documents: int
    sha256_bin: str
    sha256_idx: str


class ShardWriter:
    """Streams documents into a shard that appears under its name only when it is whole.

    Memory does not grow with the number of tokens or documents. As a context manager it finishes the shard at the end
    of the block and discards it when the block raises. `.idx` gets its name last, so a shard with an index is whole.

    Args:
        prefix: path without suffix; the folder is created when missing.
        dtype: integer type of the ids, see `dtype_for_vocabulary`.

    Raises:
        DataError: for a type the format cannot express, or ids that do not fit it.
        OSError: as the file system says (a full disk, for example); nothing stays under the final names.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            known = ", ".join(sorted(known.name for known in _CODES))
            raise DataError(f"{self.prefix}: shards cannot hold ids of type {self.dtype}; use one of {known}.")
        limits = np.iinfo(self.dtype)
        self._lowest, self._highest = int(limits.min), int(limits.max)
        self._bin_digest = hashlib.sha256()
        self._open_tokens: int | None = None  # tokens of the document that extend() began, None between documents
        self.tokens = 0
        self.documents = 0
        self.summary: ShardSummary  # set by close()
        self._files = ExitStack()
        try:
            # Leaving the stack names the files in reverse: .bin first, .idx last.
            self._idx: IO[bytes] = self._files.enter_context(atomic_write(idx_path(self.prefix), "w+b"))
            self._bin: IO[bytes] = self._files.enter_context(atomic_write(bin_path(self.prefix)))
            self._idx.write(bytes(HEADER.size))
        except BaseException:
            self.abort()
            raise

    def write(self, ids: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append whole documents: `ids` flat, `lengths` how many ids each document has, in order."""
        if self._open_tokens is not None:
            raise DataError(f"{self.prefix}: a document is still open; call end_document() before write().")
        sizes = np.asarray(lengths, dtype=np.int64)
        values = self._checked(ids)
        if sizes.ndim != 1 or (sizes.size and sizes.min() < 0) or int(sizes.sum()) != values.size:
            raise DataError(f"{self.prefix}: lengths add up to {int(sizes.sum())} but {values.size} ids were given.")
        self._append(values)
        self._end_documents(sizes)

    def extend(self, ids: npt.ArrayLike) -> None:
        """Append a piece to the document under way, one too large to hold at once; `end_document` closes it."""
        values = self._checked(ids)
        self._append(values)
        self._open_tokens = (self._open_tokens or 0) + values.size

    def end_document(self) -> None:
        """Close the document that `extend` began."""
        if self._open_tokens is None:
            raise DataError(f"{self.prefix}: end_document() without a document begun by extend().")
        self._end_documents(np.array([self._open_tokens]))
        self._open_tokens = None

    def close(self) -> ShardSummary:
        """Finish: complete the index and give both files their names."""
        if self._open_tokens is not None:
            self.end_document()
        try:
            idx_digest = self._complete_index()
            self._files.close()
        except BaseException:
            self.abort()
            raise
        self.summary = ShardSummary(
            self.prefix.name, self.tokens, self.documents, self._bin_digest.hexdigest(), idx_digest
        )
        return self.summary

    def abort(self) -> None:
        """Discard what was written; a finished older shard of this name stays."""
        self._files.__exit__(InterruptedError, InterruptedError(f"{self.prefix}: discarded"), None)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _checked(self, ids: npt.ArrayLike) -> np.ndarray:
        values = np.asarray(ids)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise DataError(
                f"{self.prefix}: expected a flat array of integer ids, got {values.dtype} of shape {values.shape}."
            )
        if values.size and (int(values.max()) > self._highest or int(values.min()) < self._lowest):
            raise DataError(
                f"{self.prefix}: ids from {int(values.min())} to {int(values.max())} do not fit {self.dtype.name}; "
                "the tokenizer does not belong to this shard."
            )
        return np.ascontiguousarray(values, dtype=self.dtype)

    def _end_documents(self, sizes: np.ndarray) -> None:
        if sizes.size and sizes.max() > LONGEST_DOCUMENT:
            raise DataError(
                f"{self.prefix}: a document has {sizes.max()} tokens, more than {LONGEST_DOCUMENT}; split it."
            )
        self._idx.write(sizes.astype("<i4").tobytes())
        self.documents += sizes.size

    def _append(self, values: np.ndarray) -> None:
        if values.size:
            data = values.data.cast("B")
            self._bin.write(data)
            self._bin_digest.update(data)
            self.tokens += values.size

    def _complete_index(self) -> str:
        """Derive offsets and documents from the lengths already there, put the header in front; the file's checksum."""
        index, size = self._idx, self.dtype.itemsize
        offset = 0
        for start in range(0, self.documents, _PIECE):
            index.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(index.read(4 * min(_PIECE, self.documents - start)), "<i4").astype("<i8")
            ends = offset + np.cumsum(lengths) * size
            index.seek(0, os.SEEK_END)
            index.write((ends - lengths * size).tobytes())
            offset = int(ends[-1])
        index.seek(0, os.SEEK_END)
        for start in range(0, self.documents + 1, _PIECE):
            index.write(np.arange(start, min(start + _PIECE, self.documents + 1), dtype="<i8").tobytes())
        index.seek(0)
        index.write(HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.documents, self.documents + 1))
        digest = hashlib.sha256()
        index.seek(0)
        while piece := index.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


class Shard:
    """A `.bin`/`.idx` pair, mapped into memory on first use.

    Opening reads the header and the last entries of the index only, so it costs the same for any size, and checks that
    both files have the size they must have. Ids and index are views of the mapped files: nothing is copied.

    Args:
        prefix: path without suffix (a path that ends in `.bin` or `.idx` is taken as well).

    Raises:
        DataError: a file is missing, truncated, or not of this format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        name = os.fspath(prefix)
        self.prefix = Path(name[:-4] if name.endswith((".bin", ".idx")) else name)
        self.idx, self.bin = idx_path(self.prefix), bin_path(self.prefix)
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise DataError(f"{path} is missing; copy it beside {self.prefix.name} again or rebuild the data set.")
        idx_size, self.bin_bytes = self.idx.stat().st_size, self.bin.stat().st_size
        with self.idx.open("rb") as stream:
            header = stream.read(HEADER.size)
            if len(header) < HEADER.size:
                raise DataError(
                    f"{self.idx} is truncated: {len(header)} bytes are less than its header of {HEADER.size}."
                )
            magic, version, code, self.num_sequences, entries = HEADER.unpack(header)
            if magic != MAGIC:
                raise DataError(f"{self.idx} is not a Megatron index: it begins with {magic!r} instead of {MAGIC!r}.")
            if version != VERSION:
                raise DataError(
                    f"{self.idx} has version {version} of the Megatron index; version {VERSION} is readable."
                )
            if code not in TYPE_CODES:
                raise DataError(f"{self.idx} has the type code {code}, which is not one of integers: {[*TYPE_CODES]}.")
            if entries < 1:
                raise DataError(f"{self.idx} has no document entries; at least the closing one is expected.")
            expected = HEADER.size + 12 * self.num_sequences + 8 * entries
            if idx_size != expected:
                raise DataError(
                    f"{self.idx} has {idx_size} bytes, but its header announces {expected}; "
                    "it is truncated or damaged: copy it again or rebuild the data set."
                )
            self.num_documents = entries - 1
            last_length, last_offset = 0, 0
            if self.num_sequences:
                last_length = self._entry(stream, HEADER.size + 4 * (self.num_sequences - 1), "<i")
                last_offset = self._entry(stream, HEADER.size + 12 * self.num_sequences - 8, "<q")
            closing = self._entry(stream, expected - 8, "<q")
        if closing != self.num_sequences:
            raise DataError(f"{self.idx} is damaged: its documents end at sequence {closing} of {self.num_sequences}.")
        self.dtype = TYPE_CODES[code]
        end = last_offset + last_length * self.dtype.itemsize
        if self.bin_bytes != end or last_offset < 0 or last_length < 0:
            raise DataError(
                f"{self.bin} has {self.bin_bytes} bytes, but its index expects {end}; "
                "it is truncated or belongs to another index: copy it again or rebuild the data set."
            )
        self.num_tokens = self.bin_bytes // self.dtype.itemsize

    @staticmethod
    def _entry(stream: IO[bytes], position: int, kind: str) -> int:
        stream.seek(position)
        return int(struct.unpack(kind, stream.read(struct.calcsize(kind)))[0])

    @cached_property
    def tokens(self) -> np.ndarray:
        """All ids, `[num_tokens]`, a read-only view of the mapped `.bin`."""
        return self.map_tokens()

    def map_tokens(self) -> np.ndarray:
        """A new mapping of all ids, which is closed with the last view of it.

        Raises:
            DataError: the file is gone, or has another size than when the shard was opened.
        """
        if not self.bin_bytes:
            return np.empty(0, self.dtype)
        return np.frombuffer(_map(self.bin, self.bin_bytes), dtype=self.dtype)

    @cached_property
    def _index(self) -> mmap.mmap:
        return _map(self.idx, HEADER.size + 12 * self.num_sequences + 8 * (self.num_documents + 1))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 `[num_sequences]`."""
        return np.frombuffer(self._index, "<i4", self.num_sequences, HEADER.size)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Byte offset of each sequence in `.bin`, int64 `[num_sequences]`."""
        return np.frombuffer(self._index, "<i8", self.num_sequences, HEADER.size + 4 * self.num_sequences)

    @cached_property
    def document_index(self) -> np.ndarray:
        """First sequence of each document and the number of sequences at the end, int64 `[num_documents + 1]`."""
        return np.frombuffer(self._index, "<i8", self.num_documents + 1, HEADER.size + 12 * self.num_sequences)

    def document(self, number: int) -> np.ndarray:
        """Ids of document `number`, a view.

        Raises:
            IndexError: outside `0 .. num_documents - 1`.
            DataError: the index points outside the `.bin`.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents} in {self.prefix}")
        first, end = int(self.document_index[number]), int(self.document_index[number + 1])
        if first == end:
            return self.tokens[:0]
        if not 0 <= first < end <= self.num_sequences:
            raise DataError(f"{self.idx} is damaged: document {number} spans the sequences {first} to {end}.")
        start, last = int(self.offsets[first]), int(self.offsets[end - 1])
        stop = last + int(self.lengths[end - 1]) * self.dtype.itemsize
        if start % self.dtype.itemsize or last % self.dtype.itemsize or not 0 <= start <= stop <= self.bin_bytes:
            raise DataError(f"{self.idx} is damaged: document {number} spans the bytes {start} to {stop}.")
        return self.tokens[start // self.dtype.itemsize : stop // self.dtype.itemsize]


def _map(path: Path, size: int) -> mmap.mmap:
    """The file, which had `size` bytes when it was checked."""
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno()).st_size
            if found == size:
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path} cannot be read any more: {error.strerror}.") from None
    raise DataError(
        f"{path} has {found} bytes, but had {size} when the data set was opened; something writes to it: "
        "copy it again or rebuild the data set, and start again."
    )
