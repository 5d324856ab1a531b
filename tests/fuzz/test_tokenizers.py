"""Mutated tokenizer files of every kind: loaded and used, or refused in a sentence; text never ends a document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from data_prep.tokenizers.base import Tokenizer
from data_prep.tokenizers.loading import encoding_name, load_tokenizer
from tests.data_prep import small_tokenizers as small
from tests.data_prep.writing import sentences
from tests.fuzz.support import counts, drive, from_file, mutate_bytes, mutate_json

TEXTS = ["the cat", "the </s> cat [SEP]", "", "naïve 漢字 🙂\n\n\x00", "x" * 300, "<unk><0x0A> <s>"]
CONFIG = {"eos_token": {"content": "</s>", "special": True}, "bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}


def used(file: Path) -> tuple[Tokenizer, list[list[int]]]:
    tokenizer = load_tokenizer(file.parent)
    ids = tokenizer.encode_batch(TEXTS)
    for one in ids:
        tokenizer.decode(one)
    return tokenizer, ids


def difference(original: tuple[Tokenizer, list[list[int]]]) -> Any:
    """What was changed silently: text that ends a document, or other ids under the same fingerprint."""

    def changed(given: object, found: tuple[Tokenizer, list[list[int]]]) -> str | None:
        tokenizer, ids = found
        if any(tokenizer.eod_id in one for one in ids):
            return "text became END_OF_DOCUMENT"
        if any(not 0 <= token < tokenizer.vocab_size for one in ids for token in one):
            return "an id outside the vocabulary"
        if tokenizer.fingerprint == original[0].fingerprint and ids != original[1]:
            return "other ids under the same fingerprint"
        return None

    return changed


@counts
@pytest.mark.parametrize("make", [small.unigram, small.word_piece, small.word_level, small.bpe])
def test_hugging_face_files(tmp_path: Path, make: Callable[[Path], Path], count: int) -> None:
    file = tmp_path / "tokenizer.json"
    make(file)
    value = json.loads(file.read_text(encoding="utf-8"))
    changed = difference(used(file))
    drive(count // 4, lambda source: mutate_json(value, source), from_file(file, used), changed=changed, refused=0.01)


def mutate_model(data: bytes, source: random.Random) -> bytes:
    """A sentencepiece model with a few pieces or settings that it cannot have been trained with."""
    model = ModelProto.FromString(data)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for _ in range(source.choice([1, 1, 2, 4])):
        piece = source.choice(model.pieces)
        match source.randrange(7):
            case 0:
                piece.score = source.choice([0.0, 1e30, -1e30, float("nan"), float("inf"), -float("inf"), -1.0])
            case 1:
                piece.type = source.choice([1, 2, 3, 4, 5, 6])
            case 2:
                piece.piece = source.choice(["", "a", "</s>", "<unk>", "\0", "x" * 1000, "<0x00>", "\u2581"])
            case 3:
                trainer.model_type = source.choice([1, 2, 3, 4])
            case 4:
                normalizer.precompiled_charsmap = mutate_bytes(normalizer.precompiled_charsmap, source)
            case 5:
                name = source.choice(["unk_id", "bos_id", "eos_id", "pad_id"])
                setattr(trainer, name, source.choice([-1, 0, 1, 2, 5, 10**6, 2**31 - 1]))
            case 6:
                normalizer.add_dummy_prefix, trainer.byte_fallback = source.random() < 0.5, source.random() < 0.5
    return model.SerializeToString()


@counts
@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_model])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_sentencepiece_models(
    tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes], rule: str, count: int
) -> None:
    file = tmp_path / "tokenizer.model"
    small.sentencepiece_unigram(file, sentences(60, 1), vocab_size=100, normalization_rule_name=rule)
    data = file.read_bytes()
    changed = difference(used(file))
    use = from_file(file, used)
    drive(count // 4, lambda source: mutate(data, source), use, changed=changed, used=0.01, refused=0.01)


@counts
def test_files_beside_a_tokenizer(tmp_path: Path, count: int) -> None:
    """tokenizer_config.json beside both kinds of file, and the tiktoken.json that names an encoding."""
    small.unigram(tmp_path / "tokenizer.json")
    config = tmp_path / "tokenizer_config.json"
    encoding = tmp_path / "encoding" / "tiktoken.json"
    encoding.parent.mkdir()

    def mutated(source: random.Random) -> tuple[Path, bytes]:
        file, value = source.choice([(config, CONFIG), (encoding, {"name": "gpt2"})])
        return file, mutate_json(value, source)

    def use(given: tuple[Path, bytes]) -> object:
        file, content = given
        file.write_bytes(content)
        if file == encoding:
            return encoding_name(file)
        return load_tokenizer(tmp_path).eod_token

    def changed(given: tuple[Path, bytes], found: str) -> str | None:
        file, content = given
        value = json.loads(content)
        if file == encoding:
            return None if value["name"] == found else f"{found!r} was used"
        named = value.get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        return None if (named if named not in (None, "") else "</s>") == found else f"{found!r} was used"

    drive(count, mutated, use, changed=changed, used=0.01, refused=0.01)
