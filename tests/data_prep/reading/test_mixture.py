"""Mixtures: exact proportions over any window, every source in epochs of its own, the same after resume."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading.dataset import open_dataset
from data_prep.reading.mixture import Mixture, MixtureSource, Phase
from tests.data_prep.support import EOD, VOCABULARY, make_documents, write_dataset

LENGTH = 4
PILE = {
    "Pile-CC": 0.1811, "PubMed Central": 0.1440, "Books3": 0.1207, "OpenWebText2": 0.1001, "ArXiv": 0.0896,
    "Github": 0.0759, "FreeLaw": 0.0612, "Stack Exchange": 0.0513, "USPTO": 0.0365, "PubMed Abstracts": 0.0307,
    "Gutenberg": 0.0217, "OpenSubtitles": 0.0155, "Wikipedia": 0.0153, "DM Mathematics": 0.0124, "Ubuntu IRC": 0.0088,
    "BookCorpus2": 0.0075, "EuroParl": 0.0073, "HackerNews": 0.0062, "YoutubeSubtitles": 0.0060, "PhilPapers": 0.0038,
    "NIH ExPorter": 0.0030, "Enron Emails": 0.0014,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [(f"s{number}", make_documents(4 + number, number, longest=30)) for number in range(22)]
    return write_dataset(tmp_path_factory.mktemp("mix") / "data", {"train": shards})


def make(folder: Path, phases: Sequence[tuple[int, Mapping[str, float]]], seed: int = 1) -> Mixture:
    data = open_dataset(folder)
    names = list(dict.fromkeys(name for _, weights in phases for name in weights))
    sources = [MixtureSource(name, data.only(f"s{number}")) for number, name in enumerate(names)]
    return Mixture(sources, LENGTH, [Phase(first, weights) for first, weights in phases], seed)


def worst_window(chosen: np.ndarray, shares: np.ndarray) -> float:
    """Largest difference, over all windows and sources, between a source's samples and its share of the window."""
    drawn = np.zeros((len(chosen) + 1, len(shares)))
    for number, source in enumerate(chosen):
        drawn[number + 1] = drawn[number]
        drawn[number + 1, source] += 1
    excess = drawn - np.arange(len(chosen) + 1)[:, None] * shares
    return float((excess.max(0) - excess.min(0)).max())


def test_the_pile_in_its_proportions_over_any_window(folder: Path) -> None:
    mixture = make(folder, [(0, PILE)])
    shares = np.array(list(PILE.values())) / sum(PILE.values())
    chosen, _ = mixture.draw(0, 20_000)
    assert worst_window(chosen, shares) < 3
    far, _ = mixture.draw(10**12 + 12_345, 5_000)
    assert worst_window(far, shares) < 3


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=12), first=st.integers(0, 10**15))
def test_any_weights_are_kept_over_any_window(folder: Path, weights: list[float], first: int) -> None:
    mixture = make(folder, [(0, {str(number): weight for number, weight in enumerate(weights)})])
    chosen, _ = mixture.draw(first, 1500)
    assert worst_window(chosen, np.array(weights) / sum(weights)) < 4


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 400), count=st.integers(0, 50))
@example(first=36, count=3)
@example(first=37, count=3)
@example(first=229, count=3)
def test_a_resumed_run_draws_the_same_samples(folder: Path, first: int, count: int) -> None:
    phases = [(0, {"a": 3, "b": 1, "c": 0.5}), (37, {"c": 1, "a": 0.2}), (230, {"b": 1})]
    whole = make(folder, phases).draw(0, 450)
    resumed = make(folder, phases).draw(first, count)
    assert np.array_equal(whole[0][first : first + count], resumed[0])
    assert np.array_equal(whole[1][first : first + count], resumed[1])


def test_each_source_is_read_in_epochs_across_changes_of_weights(folder: Path) -> None:
    mixture = make(folder, [(0, {"a": 3, "b": 1}), (100, {"a": 1, "b": 5, "c": 1}), (260, {"c": 1, "a": 1})])
    chosen, indexes = mixture.draw(0, 600)
    for number, size in enumerate(mixture.sizes):
        mine = indexes[chosen == number].tolist()
        assert mixture.drawn(600)[mixture.sources[number].name] == len(mine) > size  # more than one epoch
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size))
        assert mixture.epochs(600)[mixture.sources[number].name] == len(mine) / size


def test_weights_change_at_their_sample(folder: Path) -> None:
    mixture = make(folder, [(0, {"a": 1, "b": 0}), (50, {"a": 1, "b": 1}), (90, {"b": 1})])
    chosen, _ = mixture.draw(0, 130)
    assert not chosen[:50].any() and chosen[90:].all()
    assert abs(chosen[50:90].sum() - 20) <= 1
    assert mixture.drawn(130) == {name: Counter(chosen.tolist())[number] for number, name in enumerate("ab")}
    assert mixture.drawn(0) == {"a": 0, "b": 0}


def test_a_batch_is_its_samples(folder: Path) -> None:
    mixture = make(folder, [(0, {"a": 2, "b": 1})], seed=9)
    batch = mixture.batch(11, 6)
    assert batch.shape == (6, LENGTH + 1)
    chosen, indexes = mixture.draw(11, 6)
    for row, source, index, sample in zip(batch, chosen, indexes, range(11, 17)):
        expected = open_dataset(folder).only(f"s{source}").sequence(int(index), LENGTH)
        assert np.array_equal(row, expected)
        assert np.array_equal(mixture.sequence(sample), expected)
    assert (mixture.eod_id, mixture.vocab_size, mixture.tokenizer_fingerprint) == (EOD, VOCABULARY, "f" * 64)
    assert mixture.batch(3, 0).shape == (0, LENGTH + 1)
    assert np.array_equal(pickle.loads(pickle.dumps(mixture)).batch(11, 6), batch)
    with pytest.raises(IndexError):
        mixture.sequence(-1)


def test_seeds_differ_and_sources_are_shuffled_apart(folder: Path) -> None:
    data = open_dataset(folder).only("s20")
    twins = [MixtureSource("one", data), MixtureSource("two", data)]
    phases = [Phase(0, {"one": 1, "two": 1})]
    size = data.num_sequences(LENGTH)
    chosen, indexes = Mixture(twins, LENGTH, phases, seed=1).draw(0, 2 * size)
    assert not np.array_equal(indexes[chosen == 0], indexes[chosen == 1])
    assert not np.array_equal(indexes, Mixture(twins, LENGTH, phases, seed=2).draw(0, 2 * size)[1])


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        ([], "must hold from sample 0 on"),
        ([Phase(5, {"a": 1})], "must hold from sample 0 on"),
        ([Phase(0, {"a": 1}), Phase(9, {"a": 1}), Phase(9, {"a": 2})], "change at sample 9 after 9"),
        ([Phase(0, {"a": 1, "z": 1})], "a weight for 'z', but its sources are a"),
        ([Phase(0, {"a": -1})], "the weight of 'a' is -1"),
        ([Phase(0, {"a": float("nan")})], "the weight of 'a' is nan"),
        ([Phase(0, {"a": 0})], "all weights of the mixture are 0 from sample 0 on"),
    ],
)
def test_wrong_weights_are_refused(folder: Path, phases: list[Phase], sentence: str) -> None:
    sources = [MixtureSource("a", open_dataset(folder))]
    with pytest.raises(DataError, match=sentence):
        Mixture(sources, LENGTH, phases, seed=1)


def test_wrong_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(folder)
    phases = [Phase(0, {"a": 1})]
    with pytest.raises(DataError, match="at least one source"):
        Mixture([], LENGTH, phases, seed=1)
    with pytest.raises(DataError, match="two sources of the mixture are named 'a'"):
        Mixture([MixtureSource("a", data), MixtureSource("a", data)], LENGTH, phases, seed=1)
    other = open_dataset(write_dataset(tmp_path, {"train": [("x", make_documents(9))]}, fingerprint="0" * 64))
    with pytest.raises(DataError, match="different tokenizers"):
        Mixture([MixtureSource("a", data), MixtureSource("b", other)], LENGTH, phases, seed=1)
    ends_otherwise = open_dataset(folder)
    ends_otherwise.eod_id = 5  # as `--eod` chooses; the fingerprint stays
    with pytest.raises(DataError, match=r"id 5 in 'b' \(.*\) and with 0 in 'a' \(.*\)"):
        Mixture([MixtureSource("a", data), MixtureSource("b", ends_otherwise)], LENGTH, phases, seed=1)
    with pytest.raises(DataError, match="less than one sequence of 100000"):
        Mixture([MixtureSource("a", data)], 100_000, phases, seed=1)
