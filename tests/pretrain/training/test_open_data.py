"""A recipe's data before training: whose tokenizer it is, and what of it may be read and copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from data_prep.tokenizers.loading import copy_tokenizer, load_tokenizer
from mor_model import RecursiveTransformer
from mor_model.weights import save_weights
from pretrain.errors import RecipeError
from pretrain.recipe.recipe import build_recipe
from pretrain.training.prepare import Prepared, prepare
from tests.data_prep.small_tokenizers import unigram
from tests.data_prep.writing import documents, small_byte_bpe, small_sentencepiece, write_jsonl
from tests.data_prep.writing import run as tokenize
from tests.pretrain.support import ALONE, recipe_values, tiny_model


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a sentencepiece tokenizer of 400 entries."""
    folder = tmp_path_factory.mktemp("words")
    source = write_jsonl(folder / "a.jsonl", documents(200))
    tokenize([source], folder / "data", small_sentencepiece(folder / "t.model"))
    return folder / "data"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights that any vocabulary of 400 entries fits."""
    network = build_recipe(values_for(tmp_path, tmp_path)).network
    model = RecursiveTransformer(network)
    model.initialize(0)
    save_weights(tmp_path / "start" / "weights", model.state_dict(), network)
    return tmp_path / "start"


def values_for(data: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return recipe_values(data, tmp_path / "run", model=tiny_model(vocab_size=400), **changes)


def prepared(data: Path, start: Path, tmp_path: Path, **changes: Any) -> Prepared:
    values = values_for(data, tmp_path, initial_weights=str(start / "weights"), **changes)
    return prepare(build_recipe(values), ALONE)


def test_weights_of_another_tokenizer_of_the_same_size_are_refused(words: Path, start: Path, tmp_path: Path) -> None:
    other = load_tokenizer(small_byte_bpe(tmp_path / "tokenizer.json"))
    own = load_tokenizer(words / "tokenizer")
    assert other.vocab_size == own.vocab_size == 400
    prepared(words, start, tmp_path)  # nothing is known of them
    copy_tokenizer(other, start / "tokenizer")
    with pytest.raises(RecipeError, match=r"initial_weights: .* another tokenizer .* initial_weights_tokenizer=any"):
        prepared(words, start, tmp_path)
    assert prepared(words, start, tmp_path, initial_weights_tokenizer="any").data.fingerprint == own.fingerprint
    unigram(start / "tokenizer" / "tokenizer.json")
    copy_tokenizer(own, start / "tokenizer")  # as a checkpoint may hold two forms, of which the data has one
    prepared(words, start, tmp_path)


def test_the_tokenizer_of_a_run_is_the_one_in_its_plan(words: Path, start: Path, tmp_path: Path) -> None:
    plan = start / "plan.json"
    plan.write_text(json.dumps({"tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(RecipeError, match=r"another tokenizer .fingerprint 000000000000."):
        prepared(words, start, tmp_path)
    plan.write_text(json.dumps({"tokenizer_fingerprint": load_tokenizer(words / "tokenizer").fingerprint}))
    prepared(words, start, tmp_path)
    plan.write_text("[" * 100_000)
    with pytest.raises(RecipeError, match=r"initial_weights: .*plan\.json: is nested too deeply"):
        prepared(words, start, tmp_path)


def test_a_tokenizer_that_is_not_the_manifests_is_refused_before_training(words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(words, tmp_path / "data")
    unigram(folder / "tokenizer" / "tokenizer.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["file"] = "tokenizer/tokenizer.json"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"has fingerprint .*, the manifest says"):
        prepare(build_recipe(values_for(folder, tmp_path)), ALONE)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside/secret", "tokenizer/link", "", "a\0b"])
def test_no_file_outside_the_data_set_is_a_tokenizer(words: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    folder = shutil.copytree(words, tmp_path / "data")
    (folder / "tokenizer" / "link").symlink_to(tmp_path / "outside" / "secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.json: .*(is not the name of a file inside|leads out of)"):
        prepare(build_recipe(values_for(folder, tmp_path)), ALONE)
