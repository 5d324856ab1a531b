"""What `stats` says and draws, against counts made by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers
from matplotlib import pyplot

from data_prep.reading.length_statistics import draw_lengths, report
from data_prep.reading.manifest import read_manifest
from data_prep.sources.base import ReadOptions
from data_prep.tokenizing import encoder as engine
from tests.data_prep.support import read_index_independently
from tests.data_prep.writing import compressed, documents, run, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_bpe):
    """A data set folder, and the lengths of its documents by source."""
    folder = tmp_path_factory.mktemp("made")
    texts = documents(60, lines=30)
    rows = [json.dumps({"text": text, "set": ["A", "B"][n % 3 == 0]}) for n, text in enumerate(texts)]
    (folder / "a.jsonl.zst").write_bytes(compressed("\n".join([*rows, "broken"]).encode(), ".zst"))
    options = ReadOptions(subset_field="set", maximum_bytes=900)
    manifest = run([folder / "a.jsonl.zst"], folder / "out", byte_bpe, options=options, max_rejects=9)
    kept = {
        name: [
            len(document)
            for split in manifest.splits.values()
            for shard in split.shards
            if shard.source == name
            for document in read_index_independently(folder / "out" / shard.name)
        ]
        for name in "AB"
    }
    assert kept["A"] and kept["B"] and sum(map(len, kept.values())) < 60
    return folder / "out", kept


def test_the_report_counts_what_is_there(made):
    folder, kept = made
    said = report(read_manifest(folder))
    total = sum(map(sum, kept.values()))
    for name, lengths in kept.items():
        row = re.search(rf"^{name} +(\d+) +([\d,]+) +([\d.]+)% +([\d,]+) ", said, re.M)
        assert row is not None
        assert (int(row[1]), int(row[2].replace(",", ""))) == (len(lengths), sum(lengths))
        assert abs(float(row[3]) - 100 * sum(lengths) / total) < 0.01
    counts = Counter(length.bit_length() - 1 for lengths in kept.values() for length in lengths)
    drawn = re.findall(r"^ +([\d,]+) to +[\d,]+ +(\d+)  ", said, re.M)
    assert {int(low.replace(",", "")): int(count) for low, count in drawn if int(count)} == {
        1 << power: count for power, count in counts.items()
    }
    assert f"filtered: {60 - sum(map(len, kept.values()))} length" in said and "rejected: 1 invalid_json" in said
    assert "encoder: fastokens, 0 texts by" in said
    assert re.search(r"fertility on the sample: \d\.\d+ tokens per word", said)


def test_the_picture_shows_every_length_of_every_source(tmp_path, made, monkeypatch):
    folder, kept = made
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    draw_lengths(read_manifest(folder), tmp_path / "lengths.svg")
    monkeypatch.undo()
    (figure,) = figures
    (axes,) = figure.axes
    steps = {patch.get_label(): patch.get_data() for patch in axes.patches}
    pyplot.close(figure)
    for name, lengths in kept.items():
        values, edges, _ = steps[name]
        shares = [sum(low <= length < high for length in lengths) / len(lengths) for low, high in pairwise(edges)]
        assert abs(sum(values) - 1) < 1e-9 and max(abs(values - shares)) < 1e-9
    assert b"<svg" in (tmp_path / "lengths.svg").read_bytes()


def test_texts_the_accelerator_refuses_are_counted(tmp_path, byte_bpe, monkeypatch):
    load = engine._load_fastokens

    class Failing:
        def __init__(self, fast):
            self.fast = fast

        def encode_batch_flat(self, texts, **options):
            if any("bad" in text for text in texts):
                raise ValueError("match limit")
            return self.fast.encode_batch_flat(texts, **options)

    monkeypatch.setattr(engine, "_load_fastokens", lambda *arguments: Failing(load(*arguments)))
    texts = [f"{text} bad" if n in (7, 30, 31) else text for n, text in enumerate(documents(40))]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run([source], tmp_path / "out", byte_bpe, validation=0, test=0)
    assert manifest.engine["name"] == "fastokens" and manifest.engine["fallbacks"] == 3
    assert "encoder: fastokens, 3 texts by" in report(manifest)
    (shard,) = manifest.splits["train"].shards
    library = tokenizers.Tokenizer.from_file(str(byte_bpe))
    ids = read_index_independently(tmp_path / "out" / shard.name)
    assert [document[:-1] for document in ids] == [library.encode(text).ids for text in texts]
