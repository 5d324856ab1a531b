"""Tiny data and long-lived ranks for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.support import EVERY_FOUR, Nursery, Workers, make_dataset, recipe_values


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some thousand tokens over 64 ids, that a model can learn something from."""
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def prose_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a tokenizer and held-out text."""
    from tests.data_prep.writing import run as tokenize
    from tests.data_prep.writing import write_jsonl
    from tests.pretrain.evaluation.runs import train_tokenizer
    from tests.pretrain.evaluation.test_own_suite import prose

    folder = tmp_path_factory.mktemp("prose")
    source = write_jsonl(folder / "prose.jsonl", [prose(seed, 5 + seed % 40) for seed in range(80)])
    tokenizer = train_tokenizer(folder / "tokenizer") / "tokenizer.model"
    tokenize([source], folder / "data", tokenizer, validation=0.05, test=0.1)
    return folder / "data"


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Workers]:
    """Two ranks on this machine."""
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Workers]:
    """One rank, which still trains under DeepSpeed."""
    workers = Workers(1)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Ranks that start at once, each a process of its own."""
    forks = Nursery(tmp_path_factory.mktemp("nursery"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, two_ranks: Workers) -> Path:
    """The tiny recipe trained by two ranks without trouble, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return two_ranks.train(folder, recipe_values(tiny_data, folder / "whole", checkpoint=EVERY_FOUR))
