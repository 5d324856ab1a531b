"""Training on best-fit packed sequences: padding is neither predicted nor routed, and the batch is still one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.reading.dataset import open_dataset
from data_prep.reading.packed import PackedDataset, is_padding
from data_prep.tokenizing.packing import write_packing
from pretrain.training.batches import make_micro_batch
from tests.data_prep.support import EOD
from tests.pretrain.checkpoints.test_resume import assert_same_run, cut_back
from tests.pretrain.support import LENGTH, Workers, losses, make_dataset, metrics, recipe_values, tiny_model
from tests.pretrain.training.test_training import compare


@pytest.fixture(scope="module")
def packed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dataset(tmp_path_factory.mktemp("packed") / "data")
    write_packing(folder / "train-00000", LENGTH)
    return folder


def packed_values(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    model = tiny_model(document_masking=True, reset_positions=True)
    return recipe_values(data, run, **{"data": {"path": str(data), "packing": "best-fit"}, "model": model, **changes})


def test_labels_and_validity_are_those_of_the_packing(packed_data: Path) -> None:
    data = PackedDataset(open_dataset(packed_data), LENGTH)
    rows = [data.sequence(index, LENGTH) for index in range(data.num_sequences(LENGTH))]
    batch = make_micro_batch(rows, end_of_document=None, padding=EOD)
    tokens = torch.stack([torch.from_numpy(row.astype("int64")) for row in rows])
    padding = torch.stack([torch.from_numpy(is_padding(row, EOD)) for row in rows])
    assert batch.labels_BT.eq(-100).equal(padding[:, 1:]) and 0 < int(padding.sum()) < padding.numel() / 2
    assert batch.labels_BT[~padding[:, 1:]].equal(tokens[:, 1:][~padding[:, 1:]])
    assert batch.labelled == int((~padding[:, 1:]).sum())
    assert batch.valid_BT is not None
    # A place is left out when it is padding and nothing that counts is predicted there.
    assert (~batch.valid_BT).equal(padding[:, :-1] & padding[:, 1:])
    lone_ends = padding[:, :-1] & ~padding[:, 1:]
    assert lone_ends.any(), "the data has an end of a cut document in front of another document"
    full = make_micro_batch(rows[:1], None, padding=None)
    assert full.valid_BT is None and full.labelled == LENGTH


def test_two_ranks_train_like_one_plain_process(tmp_path: Path, packed_data: Path, two_ranks: Workers) -> None:
    """Micro-batches have different numbers of labels; every label weighs the same all the same."""
    values = packed_values(
        packed_data, tmp_path / "run", batch={"sequences": 8, "micro_batch": 2, "sequence_length": 32}
    )
    compare(two_ranks.train(tmp_path, values), values)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, packed_data: Path, two_ranks: Workers) -> None:
    values = packed_values(packed_data, tmp_path / "whole", checkpoint={"every": 4, "keep": 9}, budget={"steps": 12})
    whole = two_ranks.train(tmp_path, values)
    file = cut_back(whole, {**values, "run_dir": str(tmp_path / "again")}, tmp_path, 8)
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 8" in printed
    assert_same_run(tmp_path / "again", whole)
    assert metrics(whole, "train")[-1]["epochs"]["data"] == pytest.approx(
        12 * 8 / PackedDataset(open_dataset(packed_data), LENGTH).num_sequences(LENGTH)
    )
    assert losses(whole)[12] < losses(whole)[1] - 0.5


def test_data_that_was_not_packed_is_refused(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    from tests.pretrain.support import write_recipe

    recipe = write_recipe(tmp_path / "r.yaml", packed_values(tiny_data, tmp_path / "run"))
    code, printed = one_rank.run("--config", str(recipe), "--dry-run")
    assert code == 2 and "pack" in printed and "Traceback" not in printed
