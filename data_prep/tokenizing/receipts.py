"""The receipt of a piece: what became of every line of it. Written last, so a piece with a receipt is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import DataError
from data_prep.json_input import read_json
from data_prep.paths import inside
from data_prep.reading.manifest import SPLITS, Shard, check_names
from data_prep.tokenizing.shard_plan import WORK
from data_prep.typed import Count, as_dataclass

LENGTH_BINS = 40  # document lengths are counted by powers of two


@dataclass
class Receipt:
    """What became of one piece. `last`: the group ends here. `lines`: lines (rows, files) read, for numbering the
    rejects of later pieces. `lengths`: documents by power of two of their tokens, per source.
    """

    group: Count
    piece: Count
    last: bool
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    lines: Count = 0
    rejects: dict[str, Count] = field(default_factory=dict)
    filtered: dict[str, Count] = field(default_factory=dict)
    lengths: dict[str, list[Count]] = field(default_factory=dict)
    forced_cuts: Count = 0
    fallbacks: Count = 0
    capped: bool = False

    @property
    def train_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards.get("train", ()))


def receipt_path(folder: Path, group: int, piece: int) -> Path:
    """Path of the receipt of a piece."""
    return folder / WORK / f"piece-{group:05d}-{piece:05d}.json"


def rejects_path(folder: Path, group: int, piece: int) -> Path:
    """Path of the rejects of a piece until they are joined."""
    return folder / WORK / f"rejects-{group:05d}-{piece:05d}.jsonl"


def read_receipt(path: Path) -> Receipt:
    """Read a receipt.

    Raises:
        DataError: it is damaged.
    """
    try:
        receipt = as_dataclass(Receipt, read_json(path), path)
        check_names((shard for shards in receipt.shards.values() for shard in shards), path)
        for name in receipt.held_out.values():
            inside(path.parent, name, path)
            if not name.endswith(".jsonl.zst"):
                raise DataError(f"{path}: {name!r:.100} holds no held-out text.")
        if path.name != receipt_path(path, receipt.group, receipt.piece).name:
            raise DataError(f"{path} is of piece {receipt.piece} of group {receipt.group}.")
        if not {*receipt.shards, *receipt.held_out} <= set(SPLITS):
            raise DataError(f"{path} has other splits than {', '.join(SPLITS)}.")
        if any(len(counts) != LENGTH_BINS for counts in receipt.lengths.values()):
            raise DataError(f"{path}: lengths must hold {LENGTH_BINS} counts for each source.")
    except DataError as error:
        raise DataError(f"{error} Remove {path.name}, and its piece is done again.") from None
    return receipt
