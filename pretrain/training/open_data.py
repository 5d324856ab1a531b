"""A recipe's data, opened and checked before training: shards, tokenizer, vocabulary, mixture, validation text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import DataError
from data_prep.json_input import read_json
from data_prep.reading.dataset import TokenDataset, open_dataset
from data_prep.reading.mixture import Mixture, MixtureSource
from data_prep.reading.packed import PackedDataset
from data_prep.tokenizers.base import TokenizerInfo
from data_prep.tokenizers.loading import TOKENIZER_FILES, load_recorded_tokenizer, load_tokenizer
from mor_model.config import ModelConfig
from pretrain.errors import RecipeError
from pretrain.recipe.plan import Plan, data_sources, weight_phases
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.sections import Source
from pretrain.records.run_folder import RunFolder
from pretrain.training.validation import ValidationSet, spread


@dataclass(frozen=True)
class OpenedData:
    """What a run trains and validates on.

    Attributes:
        source: training sequences by sample number; validation: one set per source, empty where the data has no
            validation split.
        fingerprint, manifest: of the tokenizer and of the data, as plan.json records them.
        tokenizer: its file in the data set folder; tokenizer_info: what the manifest says of it.
        end_of_document: id of that token.
    """

    source: Mixture
    validation: tuple[ValidationSet, ...]
    fingerprint: str
    manifest: str
    tokenizer: Path
    tokenizer_info: TokenizerInfo
    end_of_document: int


def open_data(recipe: Recipe, plan: Plan) -> OpenedData:
    """Open the recipe's data sets.

    Raises:
        DataError: for a missing, truncated or changed shard, a folder that is no data set, or data sets that do not go
            together.
        RecipeError: when the data does not go with the network: a larger vocabulary, too little text for a sequence,
            weights to start from that another tokenizer belongs to.
    """
    length = recipe.batch.sequence_length
    sources = data_sources(recipe)
    datasets = []
    for source in sources:
        dataset = open_dataset(source.path, "train", recipe.data.verify)
        dataset = dataset if source.subset is None else dataset.only(source.subset)
        _check_fit(dataset, recipe.network, source.path, length)
        stream = PackedDataset(dataset, length) if recipe.data.packing == "best-fit" else dataset
        datasets.append(MixtureSource(source.label, stream))
    mixture = Mixture(datasets, length, weight_phases(recipe, plan), recipe.seed)
    digests = [
        f"{source.label} {source.subset} {part.dataset.manifest_digest}" for source, part in zip(sources, datasets)
    ]
    first = datasets[0].dataset
    load_recorded_tokenizer(first.tokenizer_path, first.manifest.tokenizer)  # before training, so that it can be copied
    if recipe.initial_weights is not None and recipe.initial_weights_tokenizer == "same":
        _check_initial_weights(Path(recipe.initial_weights), mixture.tokenizer_fingerprint)
    manifest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return OpenedData(
        source=mixture,
        validation=_validation_sets(recipe, sources, length),
        fingerprint=mixture.tokenizer_fingerprint,
        manifest=first.manifest_digest if len(datasets) == 1 else manifest,
        tokenizer=first.tokenizer_path,
        tokenizer_info=first.manifest.tokenizer,
        end_of_document=mixture.eod_id,
    )


def with_plan(data: OpenedData, recipe: Recipe, plan: Plan) -> OpenedData:
    """The same data for a run of another length: the weights of a mixture move at other samples."""
    mixture = data.source
    phases = weight_phases(recipe, plan)
    return replace(data, source=Mixture(mixture.sources, mixture.length, phases, mixture.seed))


def _check_initial_weights(weights: Path, fingerprint: str) -> None:
    """Refuse weights of another tokenizer than the data's: the one in the plan of their run or, where `mor import` made
    the folder, beside them. Where there is neither, nothing is known.
    """
    folder = RunFolder(weights.parent)
    try:
        plan = read_json(folder.plan_file) if folder.plan_file.is_file() else {}
        found = [plan["tokenizer_fingerprint"]] if isinstance(plan, dict) and "tokenizer_fingerprint" in plan else []
        if not found:  # there may be the same tokenizer in two forms, of which the data has one
            files = [folder.tokenizer / name for name in TOKENIZER_FILES]
            found = [load_tokenizer(file).fingerprint for file in files if file.is_file()]
    except DataError as error:
        raise RecipeError(f"initial_weights: {error}") from None
    if found and fingerprint not in found:
        raise RecipeError(
            f"initial_weights: {weights} belongs to another tokenizer (fingerprint {found[0]!s:.12}) than the data "
            f"({fingerprint:.12}), so the same ids mean other text; tokenize the text with the weights' tokenizer, or "
            "set initial_weights_tokenizer=any to train on all the same."
        )


def _check_fit(dataset: TokenDataset, config: ModelConfig, path: str, length: int) -> None:
    if dataset.vocab_size > config.vocab_size:
        raise RecipeError(
            f"model.vocab_size: {config.vocab_size} is smaller than the {dataset.vocab_size} tokens of {path}'s "
            f"tokenizer; set model.vocab_size to at least {dataset.vocab_size}, or use data of another tokenizer."
        )
    if dataset.num_sequences(length) < 1:
        raise RecipeError(
            f"data.path: {path} holds {dataset.num_tokens} training tokens, not enough for one sequence of {length}; "
            "add text or shorten batch.sequence_length."
        )


def _validation_sets(recipe: Recipe, sources: tuple[Source, ...], length: int) -> tuple[ValidationSet, ...]:
    sets: list[ValidationSet] = []
    opened: set[tuple[str, str | None]] = set()
    for source in sources:
        whole = open_dataset(source.path, "train", "structure")
        if "validation" not in whole.manifest.splits or (source.path, source.subset) in opened:
            continue
        opened.add((source.path, source.subset))
        dataset = open_dataset(source.path, "validation", recipe.data.verify)
        names = [source.subset] if source.subset is not None else dataset.sources
        for name in names:
            if name not in dataset.sources:
                continue
            part = dataset.only(name)
            available = part.num_sequences(length)
            if available:
                label = name if len(sources) == 1 or name == source.label else f"{source.label}/{name}"
                sets.append(ValidationSet(label, part, spread(available, recipe.evaluation.sequences)))
    return tuple(sets)
