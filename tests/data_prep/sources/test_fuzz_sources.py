"""Mutated corpora: every line becomes a document, a counted reject or a counted filter, and nothing else happens."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from data_prep.sources import base, lines
from data_prep.sources.base import Document, Filtered, Group, ReadOptions, Reject
from data_prep.sources.groups import reader_for
from tests.data_prep.writing import compressed, documents, jsonl, run

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
CORPUS = jsonl(documents(6, 1, 2), meta={"pile_set_name": "Pile-CC"}, language="en")
PIECES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"\n", b'"', b"\\", b"\\ud800", b"\\u0000", b"{", b"}", b"null", b"\xff", b"\r\n", b"\x00", b" "]
        ),
    ),
    min_size=1,
    max_size=6,
)


def mutated(data, raw: bytes) -> bytes:
    """`raw` with bytes put in, put over and taken out at a few places."""
    found = bytearray(raw)
    for piece in data.draw(PIECES):
        at = data.draw(st.integers(0, len(found)))
        cut = data.draw(st.integers(0, 20))
        found[at : at + cut] = piece
    return bytes(found)


@RELAXED
@given(data=st.data(), large=st.sampled_from([300, 1 << 20]))
def test_every_line_is_accounted_for(tmp_path, monkeypatch, data, large):
    for module in (base, lines):
        monkeypatch.setattr(module, "MAXIMUM", large)
    monkeypatch.setattr(lines, "_CHUNK", 32)
    raw = mutated(data, CORPUS)
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    options = ReadOptions(subset_field="meta.pile_set_name", language_field="language", languages=("en",))
    reader = reader_for(Group(0, "a", "jsonl", (str(path),), len(raw), 1, 1 << 20), options)
    found = list(reader.items(0))
    count = raw.count(b"\n") + (not raw.endswith(b"\n") and bool(raw))
    assert len(found) == count == reader.lines
    for number, item in enumerate(found, start=1):
        line = raw.split(b"\n")[number - 1]
        if isinstance(item, Document):
            record = json.loads(line)
            assert (item.line, item.text, item.subset) == (number, record["text"], record["meta"]["pile_set_name"])
        else:
            assert isinstance(item, Filtered) or item.line == number
        assert (len(line) > large) == (isinstance(item, Reject) and item.reason == "too_long")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_data_set_of_a_damaged_corpus_is_in_order_or_not_there(tmp_path_factory, byte_bpe, data):
    folder = tmp_path_factory.mktemp("fuzz")
    suffix = data.draw(st.sampled_from(["", ".zst"]))
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(mutated(data, compressed(CORPUS, suffix)))
    try:
        manifest = run([path], folder / "out", byte_bpe, max_rejects=100, max_broken=1, piece_bytes=400)
    except DataError:
        assert not (folder / "out" / "manifest.json").exists()
        return
    assert verify_dataset(folder / "out").problems == []
    listed = folder / "out" / "rejects.jsonl"
    count = len(listed.read_text().splitlines()) if listed.exists() else 0
    assert count == sum(manifest.rejects.values()) == sum(read_manifest(folder / "out").rejects.values())
