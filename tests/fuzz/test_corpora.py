"""Mutated corpora: what was not changed comes out as it went in; the rest is a document, counted, or refused."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.corpora.decontaminate import decontaminate
from data_prep.corpora.dedup import deduplicate
from data_prep.errors import DataError
from data_prep.sources import base, lines, text
from data_prep.sources.base import Document, ReadOptions, Reject
from data_prep.sources.find import find_sources
from data_prep.sources.groups import plan_groups, reader_for
from data_prep.sources.notices import notices
from tests.data_prep.writing import compressed, documents
from tests.fuzz.support import counts, drive, mutate_bytes, mutate_text, mutate_value

TEXTS = [text.replace("\n", " ") for text in documents(8, 3, 2)]
RECORDS = [{"text": t, "meta": {"set": "a", "score": 0.5}, "lang": "en", "id": n} for n, t in enumerate(TEXTS)]
OPTIONS = {
    "jsonl": ReadOptions(subset_field="meta.set", language_field="lang", languages=("en",)),
    "text": ReadOptions(separator="|"),
    "wikitext": ReadOptions(),
    "parquet": ReadOptions(),
}
SUFFIX = {"jsonl": ".jsonl", "text": ".txt", "wikitext": ".raw", "parquet": ".parquet"}
LINES = {
    "jsonl": [orjson.dumps(record) + b"\n" for record in RECORDS],
    "text": [text.encode() + b"|" for text in TEXTS],
    "wikitext": [f" = Page {n} = \n{text}\n".encode() for n, text in enumerate(TEXTS)],
}


@dataclass(frozen=True)
class Corpus:
    """A file and how it is read. before, behind: texts in front of what was changed and behind it, in this order;
    packed: it was changed after it was compressed.
    """

    name: str
    data: bytes
    options: ReadOptions
    before: list[str]
    behind: list[str]
    packed: bool = False
    piece_bytes: int = 0


def make(source: random.Random) -> Corpus:
    kind = source.choice(list(SUFFIX))
    options = OPTIONS[kind]
    if source.random() < 0.2:
        options = replace(options, maximum_bytes=10_000)
    if kind == "parquet":
        return Corpus("a.parquet", _parquet(source), options, [], [])
    pieces = LINES[kind]
    suffix = source.choice(["", ".gz", ".zst", ".xz", ".bz2"])
    whole = [piece.decode() if kind == "wikitext" else text for piece, text in zip(pieces, TEXTS)]
    piece_bytes = source.choice([0, 60, 300]) if kind != "wikitext" else 0
    if suffix and source.random() < 0.5:
        data = mutate_bytes(compressed(b"".join(pieces), suffix), source)
        return Corpus(f"a{SUFFIX[kind]}{suffix}", data, options, whole, [], True, piece_bytes)
    at = source.randrange(len(pieces))
    if kind == "jsonl" and source.random() < 0.5:
        changed = json.dumps(mutate_value(RECORDS[at], source)).encode() + b"\n"
    else:
        changed = mutate_bytes(pieces[at], source)
    data = compressed(b"".join([*pieces[:at], changed, *pieces[at + 1 :]]), suffix)
    # A page goes on to the next heading, and a line to the next newline: neighbours of the change may be part of it.
    first = max(0, at - 1) if kind == "wikitext" else at
    return Corpus(f"a{SUFFIX[kind]}{suffix}", data, options, whole[:first], whole[at + 2 :], False, piece_bytes)


def _parquet(source: random.Random) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    codec = source.choice(["none", "snappy", "zstd", "gzip"])
    pyarrow.parquet.write_table(table, sink, row_group_size=3, compression=codec)
    return mutate_bytes(sink.getvalue(), source)


def reads(folder: Path) -> Callable[[Corpus], tuple[list[str], int]]:
    """All texts of a corpus and the number of rejects, as `tokenize` reads it."""

    def use(corpus: Corpus) -> tuple[list[str], int]:
        path = folder / corpus.name
        path.write_bytes(corpus.data)
        found, _ = find_sources([str(path)], corpus.options)
        assert all(isinstance(sentence, str) for sentence in notices(found, corpus.options))
        texts, rejects = [], 0
        for group in plan_groups(found, corpus.options, corpus.piece_bytes):
            reader = reader_for(group, corpus.options)
            with contextlib.closing(reader):
                for piece in itertools.count():
                    if piece == group.pieces or (group.pieces is None and reader.end_seen):
                        break
                    items = list(reader.items(piece))
                    texts += [item.text for item in items if isinstance(item, Document)]
                    rejects += sum(isinstance(item, Reject) for item in items)
        return texts, rejects

    return use


def changed(corpus: Corpus, result: tuple[list[str], int]) -> str | None:
    texts, rejects = result
    if corpus.packed:
        return None if rejects or texts == corpus.before else f"no reject, but {texts}"
    if texts[: len(corpus.before)] != corpus.before:
        return f"{corpus.before} in front became {texts}"
    if corpus.behind and texts[-len(corpus.behind) :] != corpus.behind:
        return f"{corpus.behind} behind became {texts}"
    return None


@counts
@pytest.mark.parametrize("large", [400, 1 << 20])
def test_a_mutated_corpus_gives_what_was_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, large: int
) -> None:
    for module in (base, lines, text):
        monkeypatch.setattr(module, "MAXIMUM", large)
    monkeypatch.setattr(lines, "_CHUNK", large // 4)
    drive(count // 2, make, reads(tmp_path), seed=f"corpora {large}", changed=changed, used=0.5)


@counts
def test_a_mutated_corpus_is_deduplicated_and_decontaminated_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_bytes(b'{"q": "' + " ".join(f"word{n}" for n in range(20)).encode() + b'"}\n')

    def use(corpus: Corpus) -> tuple[list[str], int]:
        path = tmp_path / corpus.name
        path.write_bytes(corpus.data)
        for name in ("unique", "clean"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        first = deduplicate([str(path)], tmp_path / "unique", corpus.options, threshold=1.0, workers=1)
        source = next(str(path) for path in (tmp_path / "unique").glob("a-*.jsonl.zst"))
        second = decontaminate([source], [evaluation], tmp_path / "clean", corpus.options, workers=1)
        assert (second.documents, second.kept, second.rejects) == (first.kept, first.kept, {})
        written = next((tmp_path / "clean").glob("a-*.jsonl.zst"))
        again = Corpus(written.name, written.read_bytes(), corpus.options, [], [])
        return reads(tmp_path)(again)[0], sum(first.rejects.values())

    drive(count // 5, make, use, seed="clean", changed=changed, used=0.25)


@counts
def test_a_mutated_name_of_a_source_is_found_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "a.jsonl").write_bytes(b"".join(LINES["jsonl"]))
    monkeypatch.chdir(tmp_path)
    names = ["lang=en/*.jsonl", "news=lang=en/a.jsonl", "lang=en", "**", "-", "hub:a/b:c", "x=python-docs"]
    names.append("[a-z]*/?.jsonl")

    def name(source: random.Random) -> list[str]:
        found = [mutate_text(source.choice(names), source).lstrip("/") for _ in range(source.randint(1, 3))]
        return [text for text in found if ".." not in text] or ["-"]

    drive(count, name, lambda given: find_sources(given, ReadOptions()), seed="names", used=0.02, refused=0.05)
    with pytest.raises(DataError):
        find_sources(["\ud800"], ReadOptions())
