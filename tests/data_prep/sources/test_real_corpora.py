"""Real corpora with real tokenizers, as a person would run them, against the tokenizers' own libraries."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import zstandard

from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from tests.data_prep.support import read_index_independently
from tests.data_prep.tokenizing.test_tokenize import encoder, written
from tests.data_prep.writing import command

TOKENIZERS = ["smollm/tokenizer.json", "gpt2/tokenizer.json", "neox/tokenizer.json", "llama2/tokenizer.model"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_file_of_c4(tmp_path, shared_data, name):
    source = shared_data / "train" / "c4-train.00000-of-01024.json.gz"
    tokenizer = shared_data / "tokenizers" / name
    options = ("--validation", 0, "--test", 0, "--workers", 1)
    done = command("tokenize", source, "--out", tmp_path / "out", "--tokenizer", tokenizer, *options)
    texts = [json.loads(line)["text"] for line in gzip.decompress(source.read_bytes()).splitlines()]
    assert len(texts) == 1000 and "train: 1,000 documents" in done.stdout
    encode = encoder(tokenizer)
    assert written(tmp_path / "out", "train") == [encode(text) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_three_corpora(tmp_path, shared_data, name):
    counts = {"wikipedia": 14_263, "gutenberg": 454, "dc_law": 9_611}
    sources = [shared_data / "train" / f"{corpus}.jsonl.zst" for corpus in counts]
    tokenizer = shared_data / "tokenizers" / name
    options = ("--validation", 0, "--test", 0, "--workers", 2)
    command("tokenize", *sources, "--out", tmp_path / "out", "--tokenizer", tokenizer, *options)
    manifest = read_manifest(tmp_path / "out")
    assert {source["name"]: source["documents"] for source in manifest.sources} == counts
    assert verify_dataset(tmp_path / "out").problems == []
    encode, luck = encoder(tokenizer), random.Random(4)
    for source in sources:
        with source.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            lines = stream.read(40_000_000).split(b"\n")[:-1]
        chosen = luck.sample(range(len(lines)), min(8, len(lines)))
        shards = [s.name for s in manifest.splits["train"].shards if s.source == source.name.split(".")[0]]
        documents: list[list[int]] = []
        while len(documents) < len(lines):
            documents += read_index_independently(tmp_path / "out" / shards.pop(0))
        for number in chosen:
            assert documents[number] == encode(json.loads(lines[number])["text"]), (source.name, number)
