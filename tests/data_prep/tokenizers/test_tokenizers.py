"""Tokenizers: loading, fingerprints, END_OF_DOCUMENT, training on the training split alone."""

from __future__ import annotations

import json
import sys

import pytest
from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from data_prep.sources.find import find_sources
from data_prep.tokenizers.loading import copy_tokenizer, load_tokenizer
from data_prep.tokenizing import train_tokenizer as train_module
from data_prep.tokenizing.shard_plan import Settings
from data_prep.tokenizing.train_tokenizer import train_tokenizer, training_texts
from tests.data_prep import small_tokenizers as small
from tests.data_prep.tokenizing.test_tokenize import encoder, split_of
from tests.data_prep.writing import command, documents, jsonl, sentences, write_jsonl


def settings_for(path, **more):
    options = ReadOptions()
    found, _ = find_sources([str(path)], options)
    return Settings(sources=tuple(found), options=options, **more)


@pytest.mark.parametrize(
    ("fixture", "kind", "end"),
    [("byte_bpe", "huggingface", "<|endoftext|>"), ("sentencepiece_model", "sentencepiece", "</s>")],
)
def test_ids_are_those_of_the_tokenizers_own_library(request, fixture, kind, end):
    path = request.getfixturevalue(fixture)
    ours, text = load_tokenizer(path), sentences(20, 3)
    assert [*ours.encode(text), ours.eod_id] == encoder(path)(text)
    assert ours.encode_batch([text, "a"]) == [ours.encode(text), ours.encode("a")]
    assert ours.decode(ours.encode(text)) == text
    assert (ours.kind, ours.vocab_size, ours.eod_token) == (kind, 400, end)
    with pytest.raises(DataError, match="<nothing>"):
        load_tokenizer(path, "<nothing>")


def test_what_a_tokenizer_file_says_of_length_and_framing_is_not_done(byte_bpe, tmp_path):
    content = json.loads(byte_bpe.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 2000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    for text in (sentences(20, 3), "short"):
        assert load_tokenizer(path).encode(text) == load_tokenizer(byte_bpe).encode(text)


def test_a_fingerprint_is_of_what_decides_ids(byte_bpe, sentencepiece_model, tmp_path):
    content = json.loads(byte_bpe.read_text())
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(content, indent=7))
    content["pre_tokenizer"]["add_prefix_space"] = True
    other.write_text(json.dumps(content))
    wanted = load_tokenizer(byte_bpe).fingerprint
    assert load_tokenizer(same).fingerprint == wanted != load_tokenizer(other).fingerprint
    data = sentencepiece_model.read_bytes()
    copy, another = tmp_path / "copy.model", tmp_path / "another.model"
    copy.write_bytes(data)
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.pieces[-1].score -= 1
    another.write_bytes(model.SerializeToString())
    wanted = load_tokenizer(sentencepiece_model).fingerprint
    assert load_tokenizer(copy).fingerprint == wanted != load_tokenizer(another).fingerprint


def test_a_folder_names_end_of_document(byte_bpe, sentencepiece_model, tmp_path):
    for path, token in ((byte_bpe, "<|pad|>"), (sentencepiece_model, "<s>")):
        folder = tmp_path / path.name
        copy_tokenizer(load_tokenizer(path, token), folder)
        again = load_tokenizer(folder)
        assert again.eod_token == token
        assert again.fingerprint == load_tokenizer(path).fingerprint
        assert load_tokenizer(path).eod_token != token


ADDED = {"content": "<new>", "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}


def unigram_with(**changes):
    def content(path):
        value = json.loads(small.unigram(path).read_text())
        for place, replacement in changes.items():
            parent, _, key = place.rpartition("__")
            (value[parent] if parent else value)[key] = replacement
        return json.dumps(value).encode()

    return content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no tokenizer at"),
        ("bad.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("bad.json", b'{"model": {"vocab": "x"}}', "has no vocabulary"),
        ("bad.json", b'{"model": {"vocab": {}}}', "vocabulary is empty"),
        ("bad.json", b"\xff\xfe{}", r"bad.json: is not UTF-8 text \(byte 0\)"),
        ("bad.json", b"[" * 100_000, "nested too deeply"),
        ("bad.json", unigram_with(added_tokens=7), "added_tokens must be a list"),
        ("bad.json", unigram_with(added_tokens=[{"content": "</s>"}]), "the id of token '</s>' must be a number"),
        ("bad.json", unigram_with(added_tokens=[{"content": "x", "id": 10**30}]), "the id of token 'x'"),
        ("bad.json", unigram_with(added_tokens=[{"content": "\ud800", "id": 3}]), "not a Hugging Face tokenizer"),
        ("bad.json", unigram_with(added_tokens=[{"content": "x", "id": 500}]), "not a Hugging Face tokenizer"),
        ("bad.json", unigram_with(added_tokens=[{**ADDED, "id": 500}]), "the tokenizers library gives it"),
        ("bad.json", unigram_with(model__unk_id="0"), "model.unk_id"),
        ("bad.json", unigram_with(model__unk_id=5000), "not a Hugging Face tokenizer.json: Unable to load"),
        ("bad.json", unigram_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "charsmap"),
        ("bad.model", b"nonsense", "not a sentencepiece model"),
        ("bad.model", b"", "not a sentencepiece model|no end-of-sentence piece"),
        ("tiktoken.json", b"{", "cannot be read as JSON"),
        ("tiktoken.json", b'{"name": ["gpt2"]}', "expected an object with the name of a tiktoken encoding"),
    ],
)
def test_what_is_not_a_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content(tmp_path / name) if callable(content) else content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path / name).encode("text")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected an object with eos_token"),
        (b'{"eos_token": 7}', "must be the name of a token, found 7"),
        (b'{"eos_token": {"content": ["x"]}}', "must be the name of a token"),
    ],
)
def test_a_configuration_beside_it_that_cannot_be_meant(byte_bpe, sentencepiece_model, tmp_path, content, message):
    for path in (byte_bpe, sentencepiece_model):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: .*{message}"):
            load_tokenizer(tmp_path / path.name)
        assert load_tokenizer(tmp_path / path.name, "<s>" if path.suffix == ".model" else "<|pad|>").eod_id >= 0


def test_an_end_of_document_that_the_configuration_names_in_vain(byte_bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_bpe.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(DataError, match=r"no token '<end>', the eos_token of the tokenizer_config.json beside it"):
        load_tokenizer(tmp_path)


def test_what_a_library_cannot_encode_or_decode_is_said(byte_bpe, sentencepiece_model):
    for path in (byte_bpe, sentencepiece_model):
        tokenizer = load_tokenizer(path)
        with pytest.raises(DataError, match=f"{path.name}: cannot encode a text"):
            tokenizer.encode("half a pair \ud800")
        with pytest.raises(DataError, match=f"{path.name}: cannot decode ids"):
            tokenizer.decode([-5])


def test_a_copy_is_compared_with_what_was_loaded(byte_bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_bpe.read_bytes())
    tokenizer = load_tokenizer(path)
    small.bpe(path, end="<|endoftext|>")
    with pytest.raises(DataError, match="has changed since it was loaded"):
        copy_tokenizer(tokenizer, tmp_path / "copy")


def test_tiktoken_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="pip install tiktoken"):
        load_tokenizer("tiktoken:gpt2")


def test_tiktoken_encodings_are_used_where_installed(tmp_path, tiktoken_encoding):
    tokenizer = load_tokenizer(tiktoken_encoding)
    assert tokenizer.encode("the <|endoftext|>")[0] == 257
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (258, 260)
    assert 258 not in tokenizer.encode("a <|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("the é")) == "the é"
    copy_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"])
def test_a_trained_tokenizer_keeps_every_text(tmp_path, kind):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300))
    out = tmp_path / ("t.json" if kind == "byte-bpe" else "t.model")
    tokenizer, counts = train_tokenizer(settings_for(source), out, kind, 380, 0)
    assert tokenizer.vocab_size == 380
    assert counts["documents"] + counts["held_out"] == 300
    for text in (sentences(30, 99), "  two  spaces ", "\n\n\ttab", "unseen: ж 𝄞 \x01", "1234567890"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod_id not in tokenizer.encode(f"a {tokenizer.eod_token} b")
    again = tmp_path / f"again{out.suffix}"
    train_tokenizer(settings_for(source), again, kind, 380, 0)
    assert again.read_bytes() == out.read_bytes()


def test_training_sees_the_training_split_alone(tmp_path):
    texts = documents(400)
    source = write_jsonl(tmp_path / "a.jsonl.zst", texts)
    counts = dict.fromkeys(("documents", "bytes", "left_out", "held_out"), 0)
    settings = settings_for(source, validation=0.2, test=0.1, split_seed=3, piece_bytes=5000)
    seen = list(training_texts(settings, 0, counts))
    assert seen == [text for text in texts if split_of(text, 0.2, 0.1, 3) == "train"]
    assert counts["held_out"] == 400 - len(seen)


def test_a_sample_is_spread_over_the_source(tmp_path):
    texts = documents(2000, lines=2)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    size = source.stat().st_size
    counts = dict.fromkeys(("documents", "bytes", "left_out", "held_out"), 0)
    seen = list(training_texts(settings_for(source), size // 10, counts))
    assert 0.06 * size < counts["bytes"] < 0.14 * size
    places = [texts.index(text) for text in seen]
    assert places == sorted(places) and places[0] < 100 and places[-1] > 1900


def test_lines_are_cut_below_sentencepieces_limit():
    lines = list(train_module._sentences(iter(["short\n" + "é" * 9000, "word " * 3000])))
    assert lines[0] == "short"
    assert "".join(lines[1:]) == "é" * 9000 + "word " * 3000
    assert max(len(line.encode()) for line in lines) <= 2 * train_module._SENTENCE


@pytest.mark.parametrize(
    ("kind", "name", "size", "message"),
    [
        ("bpe", "t.model", 400, "must be one of"),
        ("byte-bpe", "t.model", 400, "is a .json file"),
        ("sentencepiece-bpe", "t.model", 100, "too small"),
        ("sentencepiece-bpe", "t.model", 30_000, "could not train a vocabulary of 30000"),
    ],
)
def test_what_cannot_be_trained(tmp_path, kind, name, size, message):
    source = write_jsonl(tmp_path / "a.jsonl", documents(20))
    with pytest.raises(DataError, match=message):
        train_tokenizer(settings_for(source), tmp_path / name, kind, size, 0)
    assert not (tmp_path / name).exists()


def test_the_commands(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(documents(300)) + b"broken\n")
    done = command("tokenizer", "train", source, "--out", tmp_path / "t.model", "--vocab-size", 380)
    assert "sentencepiece-bpe, 380 entries" in done.stdout and "1 left out" in done.stdout
    checked = command("tokenizer", "check", tmp_path / "t.model", source).stdout
    assert "END_OF_DOCUMENT: </s>" in checked and "tokens per word" in checked
