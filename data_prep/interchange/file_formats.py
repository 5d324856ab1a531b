"""Formats that files without a header are confused with, told by how they begin."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.errors import DataError

_LOOK = 4096
_LEAST_TEXT = 256  # bytes; fewer can be printable by chance
# Only what is long enough not to be the first ids of a token file.
_BEGINNINGS = [
    (rb"\x88\xd8\x34\x01", "llm.c's, with a header of 1,024 bytes (remove it: `tail -c +1025 FILE > IDS.bin`)"),
    (rb"\x93NUMPY", "numpy's (import it as olmo)"),
    (rb"MMIDIDX\x00\x00", "an index of Megatron's (import its .bin as megatron)"),
    (rb"TNTIDX\x00\x00", "an index of fairseq's"),
    (rb"\x1f\x8b\x08[\x00-\x1f]", "gzip's (decompress it)"),
    (rb"\x28\xb5\x2f\xfd", "zstd's (decompress it)"),
    (rb"\xfd7zXZ\x00", "xz's (decompress it)"),
    (rb"BZh[1-9]1AY&SY", "bzip2's (decompress it)"),
    (rb"PK\x03\x04", "zip's, which numpy's .npz and PyTorch's files are too"),
    (rb"PAR1", "parquet's (`tokenize` reads it)"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5's"),
    (rb"ARROW1\x00\x00", "Arrow's"),
]


def refuse_other_format(path: Path) -> None:
    """Check that a file of raw ids begins like nothing else.

    Raises:
        DataError: it is of another format, which the message names, or text; or it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            beginning = stream.read(_LOOK)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    for pattern, name in _BEGINNINGS:
        if re.match(pattern, beginning, re.DOTALL):
            raise DataError(f"{path} holds no raw ids: its format is {name}.")
    if len(beginning) >= _LEAST_TEXT and not re.search(rb"[^\t\n\r -~]", beginning):
        raise DataError(f"{path} holds no raw ids but text; `tokenize` reads it.")
