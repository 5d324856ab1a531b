"""Text never becomes END_OF_DOCUMENT, whatever kind of tokenizer there is, or the tokenizer is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from data_prep.tokenizers.loading import copy_tokenizer, load_tokenizer
from data_prep.tokenizing.encoder import Engine, choose_engine
from tests.data_prep import small_tokenizers as small
from tests.data_prep.support import read_index_independently
from tests.data_prep.writing import run, small_byte_bpe, write_jsonl

KINDS = {
    "unigram": (small.unigram, {}),
    "word pieces": (small.word_piece, {}),
    "words": (small.word_level, {}),
    "merged by the model": (small.bpe, {}),
    "looked up by the model": (small.bpe, {"merged": False, "ignore_merges": True}),
    "added, but not as special": (small.bpe, {"merged": False, "special": False}),
}


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    make, more = KINDS[request.param]
    return load_tokenizer(make(tmp_path / "tokenizer.json", **more))


def texts_with(end: str) -> list[str]:
    return [end, f"the {end} cat", f"the{end}cat", f"{end}{end} {end}\n{end}", f"({end})", end * 50, f"x {end}"]


def test_its_name_is_text(tokenizer):
    end = tokenizer.eod_token
    assert tokenizer.decode([tokenizer.eod_id]).strip() == end
    engine, _ = choose_engine(tokenizer, [])
    kind = tokenizer.content["model"]["type"]
    for text in texts_with(end):
        ids = tokenizer.encode(text)
        assert ids and tokenizer.eod_id not in ids
        assert engine.encode([text])[0].tolist() == ids
        if kind == "BPE" or (kind == "Unigram" and "\n" not in text):  # others do not keep the spaces
            assert tokenizer.decode(ids) == text


def test_other_control_tokens_are_text_as_well(tmp_path):
    path = small.unigram(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["vocab"].append(["<pad>", -1.0])
    number = len(content["model"]["vocab"]) - 1
    content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": "<pad>"})
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert number not in tokenizer.encode("a <pad> b")
    assert tokenizer.decode(tokenizer.encode("a <pad> b")) == "a <pad> b"


def test_an_accelerator_that_makes_control_tokens_of_text_is_refused(tmp_path):
    path = small.bpe(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["merges"] += [["<", "t"], ["<t", ">"]]
    number = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {"<t": number, "<t>": number + 1}
    content["added_tokens"].append({**content["added_tokens"][0], "id": number + 1, "content": "<t>"})
    path.write_text(json.dumps(content))
    engine, report = choose_engine(load_tokenizer(path), [])
    assert report["name"] == "reference" and "1 of " in report["refused"]["fastokens"]
    assert number + 1 not in engine.encode(["a <t> b"])[0]


def test_as_many_ends_as_documents(tokenizer, tmp_path):
    end = tokenizer.eod_token
    texts = [f"{number} the cat {end} sat {end}" if number % 3 else f"{number} the cat" for number in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    folder = tmp_path / "out"
    run([source], folder, tokenizer.path, validation=0.1, test=0.1)
    manifest = read_manifest(folder)
    for split in manifest.splits.values():
        documents = [d for shard in split.shards for d in read_index_independently(folder / shard.name)]
        assert [d.count(tokenizer.eod_id) for d in documents] == [1] * split.documents
    assert verify_dataset(folder).ok


def test_a_token_that_other_text_becomes_is_refused(tmp_path, sentencepiece_model):
    unknown = small.unigram(tmp_path / "unknown.json")
    with pytest.raises(DataError, match="other text becomes '<unk>'"):
        load_tokenizer(unknown, "<unk>")
    content = json.loads(unknown.read_text())
    content["model"]["byte_fallback"] = True
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
    (tmp_path / "bytes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="other text becomes '<0x0A>'"):
        load_tokenizer(tmp_path / "bytes.json", "<0x0A>")
    for piece in ("<unk>", "<0x0A>", "\u2581the"):
        with pytest.raises(DataError, match="is no control piece"):
            load_tokenizer(sentencepiece_model, piece)


def test_a_sentencepiece_symbol_of_the_users_is_refused(tmp_path):
    path = small.sentencepiece_unigram(tmp_path / "t.model", "the cat sat\n" * 9, user_defined_symbols=["<|end|>"])
    with pytest.raises(DataError, match=r"'<\|end\|>' is no control piece"):
        load_tokenizer(path, "<|end|>")
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod_id not in tokenizer.encode("the cat </s> sat")


def test_a_token_that_cannot_be_spelled_otherwise_is_refused_before_the_work(tmp_path):
    path = small.unigram(tmp_path / "tokenizer.json", end="§")
    source = write_jsonl(tmp_path / "a.jsonl", ["plain text"] * 20)
    with pytest.raises(DataError, match="text becomes END_OF_DOCUMENT, '§'"):
        run([source], tmp_path / "out", path, eod_token="§")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ids_are_looked_at_where_they_enter_the_shards(byte_bpe, monkeypatch):
    """A tokenizer that breaks its word all the same, and an accelerator that does."""
    tokenizer = load_tokenizer(byte_bpe)
    engine = Engine(tokenizer)
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda self, texts: [[5, 0, 7] for _ in texts])
    with pytest.raises(DataError, match=r"END_OF_DOCUMENT, '<\|endoftext\|>', in the document with 'some text'"):
        engine.encode(["some text"])


class Careless:
    """An accelerator that takes names in texts for control tokens."""

    def encode_batch_flat(self, texts, **options):
        return np.array([0] * len(texts), np.uint32).tobytes(), np.arange(len(texts) + 1).tobytes()


def test_what_an_accelerator_makes_end_of_document_goes_to_the_reference(tmp_path):
    tokenizer = load_tokenizer(small_byte_bpe(tmp_path / "tokenizer.json"))
    engine = Engine(tokenizer)
    engine._fast = Careless()
    assert engine.encode(["one", "two"])[0].tolist() == [*tokenizer.encode("one"), *tokenizer.encode("two")]
    assert engine.fallbacks == 2


def test_a_tiktoken_encoding_keeps_its_end_of_document(tmp_path, tiktoken_encoding):
    tokenizer = load_tokenizer(tiktoken_encoding, "<|stop|>")
    for text in texts_with("<|stop|>"):
        assert not {258, 259} & set(tokenizer.encode(text))
    copy_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).eod_token == "<|stop|>"
