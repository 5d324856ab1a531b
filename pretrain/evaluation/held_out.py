"""The run's held-out text: which files, and which part of it is read.

The part is measured in bytes, not tokens, and taken in an order that depends on the documents alone. So models with
other tokenizers or another order of training data are measured on the same text.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_prep.errors import DataError
from data_prep.sources.base import SourceError
from data_prep.sources.streams import ByteStream
from pretrain.errors import RecipeError, RunError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.recipe.yaml_input import read_yaml
from pretrain.records.run_folder import RunFolder

TEST_FILE = Path("held_out", "test.jsonl.zst")
_LONGEST_LINE = 1 << 28


class Document(NamedTuple):
    text: str
    source: str


def held_out_files(run: RunFolder, data: Path | None = None) -> list[Path]:
    """Files with the held-out test documents of the run's data sets.

    Args:
        data: data set folder to read instead of the ones the recipe names (they may have moved).

    Raises:
        RunError: the recipe names no data set, or a data set has no held-out text.
    """
    if data is not None:
        return texts_of([data])
    try:
        named = read_yaml(run.recipe_file)["data"]
        folders = [Path(source["path"]) for source in ([named] if named.get("path") else named["sources"])]
    except (OSError, RecipeError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{run.recipe_file}: names no data set ({error}); give its folder with --data DIR.") from None
    return texts_of(folders)


def texts_of(folders: Iterable[Path]) -> list[Path]:
    """Files with the held-out documents of data sets, each once.

    Raises:
        RunError: a data set has none.
    """
    files = list({(folder / TEST_FILE).resolve(): folder / TEST_FILE for folder in folders}.values())
    for file in files:
        if not file.is_file():
            raise RunError(
                f"{file}: missing; {', '.join(HELD_OUT_SUITES)} read held-out documents. Prepare the data set with a "
                "test split (mor prep tokenize), leave these suites out, or name another folder (mor eval --data DIR)."
            )
    return files


def read_documents(files: Sequence[Path], most_bytes: int) -> tuple[list[Document], str]:
    """The first documents in the order of their texts' SHA-256, as many as reach `most_bytes` UTF-8 bytes.

    Memory is bounded by `most_bytes` and the longest document.

    Args:
        files: JSON lines (.jsonl.zst) with the fields `text` and, where there is one, `source`.

    Returns:
        (documents, SHA-256 over all documents of all files in any order).

    Raises:
        DataError: a file that is not zstandard, a line that is not an object with a text, or no text at all.
    """
    chosen: list[tuple[int, Document, int]] = []  # a heap with the largest hash on top
    size = everything = 0
    for file in files:
        for document in _documents(file):
            text = document.text.encode("utf-8")
            order = int.from_bytes(hashlib.sha256(text).digest(), "big")
            everything = (everything + order) % (1 << 256)
            heapq.heappush(chosen, (-order, document, len(text)))
            size += len(text)
            while size - chosen[0][2] >= most_bytes:
                size -= heapq.heappop(chosen)[2]
    if not chosen:
        raise DataError(
            f"{', '.join(map(str, files))}: no held-out documents; prepare the data set with a larger test share."
        )
    return [document for _, document, _ in sorted(chosen, reverse=True)], f"{everything:064x}"


def _documents(file: Path) -> Iterator[Document]:
    number = 0
    try:
        for line in _lines(file):
            number += 1
            record = orjson.loads(line)
            text, source = record["text"], record.get("source") or ""
            if not isinstance(text, str) or not isinstance(source, str):
                raise TypeError("text and source must be strings")
            if text.strip():
                yield Document(text, source)
    except (SourceError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        problem = str(error) if isinstance(error, SourceError) else repr(error)
        raise DataError(f"{file}: damaged at or after line {number} ({problem}); prepare the data set again.") from None


def _lines(file: Path) -> Iterator[bytes]:
    """Lines of a compressed file. `SourceError`: it is damaged or ends early; `DataError`: a line without an end."""
    rest = b""
    with contextlib.closing(ByteStream(file)) as stream:
        while data := stream.read():
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
            if len(rest) > _LONGEST_LINE:
                raise DataError(f"{file}: has a line of more than {_LONGEST_LINE:,} bytes; prepare the data set again.")
    if rest:
        yield rest


def text_identity(texts: Sequence[str]) -> dict[str, Any]:
    """{text_bytes, text_sha256}: UTF-8 bytes of the texts together, and the SHA-256 of the texts in their order.

    Figures compare only where these are equal.
    """
    digest, size = hashlib.sha256(), 0
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        size += len(encoded)
    return {"text_bytes": size, "text_sha256": digest.hexdigest()}


def choose(documents: Sequence[Document], most_bytes: int) -> list[Document]:
    """Documents in the order of their texts' SHA-256, up to `most_bytes` UTF-8 bytes; the last is cut after a word."""
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.text.encode("utf-8")).digest())
    chosen = []
    room = most_bytes
    for document in ordered:
        encoded = document.text.encode("utf-8")
        if len(encoded) > room:
            cut = encoded[:room].decode("utf-8", errors="ignore")
            head = cut[: max(cut.rfind(" "), cut.rfind("\n"), 0)].rstrip()
            if head:
                chosen.append(Document(head, document.source))
            break
        chosen.append(document)
        room -= len(encoded)
    return chosen
