"""Documents and sequences of a data set as a person can read them."""

from __future__ import annotations

import os

import numpy as np

from data_prep.errors import DataError
from data_prep.plain_text import plain
from data_prep.reading.dataset import TokenDataset, document_ids, open_dataset, open_shard
from data_prep.reading.packed import PackedDataset, is_padding
from data_prep.tokenizers.base import Tokenizer
from data_prep.tokenizers.loading import load_tokenizer


def show_document(folder: str | os.PathLike[str], split: str, number: int, ids: bool = False) -> str:
    """Document `number` of a split: where it lies, its source and its text.

    Raises:
        DataError: there is no such split or document.
    """
    data = open_dataset(folder, split)
    left = number
    for entry in data.manifest.splits[split].shards:
        if left < entry.documents:
            tokens = open_shard(data.path, entry, data.manifest.dtype).document(left)
            head = f"document {number} of {split}: {len(tokens):,} tokens, source {entry.source}, shard {entry.name}"
            return "\n".join([plain(head), *_shown(load_tokenizer(data.tokenizer_path), data, tokens, ids)])
        left -= entry.documents
    raise DataError(f"{folder} has {data.num_documents:,} documents in {split}; there is no number {number}.")


def show_sequence(folder: str | os.PathLike[str], split: str, number: int, length: int, ids: bool = False) -> str:
    """Sequence `number` as training reads it, one paragraph per document in it.

    length: 0 for the one the data set was packed for, or 2048. A data set that is packed best-fit is shown packed at
    its own length, and joined at any other.

    Raises:
        DataError: there is no such split or sequence.
    """
    data = open_dataset(folder, split)
    settings = data.manifest.settings
    own = int(settings.get("sequence_length", 0))
    length = length or own or 2048
    packed = PackedDataset(data, length) if settings.get("packing") == "best-fit" and length == own else None
    count = (packed or data).num_sequences(length)
    if number >= count:
        raise DataError(f"{folder} has {count:,} sequences of {length} in {split}; there is no number {number}.")
    tokens = (packed or data).sequence(number, length)
    what = "tokens and the next one"
    if packed is not None:
        padding = is_padding(tokens, data.eod_id)
        what += f", packed best-fit with {int(padding.sum())} of padding"
        tokens = tokens[~padding]
    documents = document_ids(tokens, data.eod_id)
    head = f"sequence {number} of {count:,} in {split}: {length} {what}, {documents[-1] + 1} document(s)"
    return "\n".join([head, *_shown(load_tokenizer(data.tokenizer_path), data, tokens, ids)])


def _shown(tokenizer: Tokenizer, data: TokenDataset, tokens: np.ndarray, ids: bool) -> list[str]:
    lines: list[str] = []
    documents = document_ids(tokens, data.eod_id)
    for number in range(int(documents[-1]) + 1 if len(tokens) else 0):
        own = tokens[documents == number].tolist()
        ended = own[-1] == data.eod_id
        lines.append(f"--- {len(own)} tokens" + (", complete to END_OF_DOCUMENT" if ended else ", goes on"))
        if ids:
            lines.append(" ".join(map(str, own)))
        lines.append(plain(tokenizer.decode(own[:-1] if ended else own), lines=True))
    return lines
