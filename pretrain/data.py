"""A recipe's data, opened and checked before training: shards, tokenizer, vocabulary, validation text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import TokenDataset, open_dataset
from mor_model.config import ModelConfig
from pretrain.batches import SampleSource, ShuffledDataset
from pretrain.errors import RecipeError
from pretrain.recipe import Recipe
from pretrain.validation import ValidationSet, spread


@dataclass(frozen=True)
class OpenedData:
    """What a run trains and validates on.

    Attributes:
        source: training sequences by sample number; sequences: how many there are before an epoch ends.
        validation: one set per source; empty where the data has no validation split.
        fingerprint, manifest: of the tokenizer and of the data, as plan.json records them.
        tokenizer: file or folder of the tokenizer, to copy into the run folder.
        end_of_document: its token.
    """

    source: SampleSource
    sequences: int
    validation: tuple[ValidationSet, ...]
    fingerprint: str
    manifest: str
    tokenizer: Path
    end_of_document: int


def open_data(recipe: Recipe, config: ModelConfig) -> OpenedData:
    """Open the recipe's data sets.

    Raises:
        DataError: for a missing, truncated or changed shard, or a folder that is no data set.
        RecipeError: when the data does not go with the network: a larger vocabulary, too little text for one sequence.
    """
    assert recipe.data.path is not None
    length = recipe.batch.sequence_length
    dataset = open_dataset(recipe.data.path, "train", recipe.data.verify)
    _check_fit(dataset, config, recipe.data.path, length)
    return OpenedData(
        source=ShuffledDataset(dataset, length, recipe.seed, Path(recipe.data.path).name),
        sequences=dataset.num_sequences(length),
        validation=_validation_sets(recipe, dataset, length),
        fingerprint=dataset.tokenizer_fingerprint,
        manifest=dataset.manifest_digest,
        tokenizer=dataset.tokenizer_path,
        end_of_document=dataset.eod_id,
    )


def _check_fit(dataset: TokenDataset, config: ModelConfig, path: str, length: int) -> None:
    if dataset.vocab_size > config.vocab_size:
        raise RecipeError(
            f"model.vocab_size: {config.vocab_size} is smaller than the {dataset.vocab_size} tokens of {path}'s "
            "tokenizer; "
            f"set model.vocab_size to at least {dataset.vocab_size}, or use data of another tokenizer."
        )
    if dataset.num_sequences(length) < 1:
        raise RecipeError(
            f"data.path: {path} holds {dataset.num_tokens} training tokens, not enough for one sequence of {length}; "
            "add text or shorten batch.sequence_length."
        )


def _validation_sets(recipe: Recipe, train: TokenDataset, length: int) -> tuple[ValidationSet, ...]:
    if "validation" not in train.manifest.splits:
        return ()
    dataset = open_dataset(train.path, "validation", recipe.data.verify)
    sets = []
    for source in dataset.sources:
        part = dataset.only(source) if len(dataset.sources) > 1 else dataset
        available = part.num_sequences(length)
        if available:
            sets.append(ValidationSet(source, part, spread(available, recipe.evaluation.sequences)))
    return tuple(sets)
