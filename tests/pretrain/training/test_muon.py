"""Muon: orthogonal updates, and under every ZeRO stage those of one plain process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import RecipeError
from pretrain.recipe.deepspeed_json import resolve_ds_config
from pretrain.recipe.recipe import build_recipe
from pretrain.training.muon import Muon, orthogonalize
from tests.pretrain.checkpoints.test_resume import assert_same_run, cut_back
from tests.pretrain.reference import plain_losses, plain_muon
from tests.pretrain.support import Workers, losses, recipe_values, tiny_model
from tests.pretrain.training.test_training import compare

# Gradients are clipped at nearly every step, so that it matters whether that happens before Muon or after.
OPTIM = {"name": "muon", "lr": 0.01, "weight_decay": 0.1, "grad_clip": 0.5}


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 48), (1, 7), (130, 16)])
def test_singular_values_end_near_one_and_their_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrix)
    # The five steps take any singular value from 0.01 to 1 (of the largest) into this band (Jordan et al. 2024).
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    aligned = left.T @ found.double() @ right.T
    assert (aligned - aligned.diag().diag()).abs().max() < 1e-4
    torch.testing.assert_close(found * 0.2 * max(shape) ** 0.5, plain_muon(matrix, []), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_without_zero_it_is_torchs_muon() -> None:
    """Ten steps on one matrix. torch iterates in bf16, so the weights agree as far as that reaches."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(24, 40, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    ours = Muon([{"params": [mine], **settings}], {id(mine): (24,)}, betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        gradient = torch.randn(24, 40, generator=generator)
        for parameter, optimizer in ((mine, ours), (theirs, reference)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, expected = mine.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


def values_at(stage: str, data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return recipe_values(data, run, optim=OPTIM, deepspeed={"config": stage}, **changes)


@pytest.mark.parametrize(
    "stage",
    [pytest.param("zero0", marks=pytest.mark.slow), "zero1", pytest.param("zero2", marks=pytest.mark.slow), "zero3"],
)
def test_two_ranks_train_like_one_plain_process(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: str
) -> None:
    """Losses, gradient norms and weights; matrices are cut between the ranks."""
    values = values_at(
        stage, tiny_data, tmp_path / "run", batch={"sequences": 8, "micro_batch": 2, "sequence_length": 32}
    )
    compare(two_ranks.train(tmp_path, values), values)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_bf16_stays_near(tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: str) -> None:
    values = values_at(stage, tiny_data, tmp_path / "run", precision="bf16")
    found = losses(two_ranks.train(tmp_path, values))
    assert list(found.values()) == pytest.approx(plain_losses(values)[0], abs=0.05)


@pytest.mark.parametrize(
    "stage", [pytest.param("zero0", marks=pytest.mark.slow), "zero2", pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_resuming_gives_the_undisturbed_run(tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: str) -> None:
    values = values_at(
        stage, tiny_data, tmp_path / "whole", checkpoint={"every": 5, "keep": 9}, model=tiny_model("recursive")
    )
    whole = two_ranks.train(tmp_path, values)
    file = cut_back(whole, {**values, "run_dir": str(tmp_path / "again")}, tmp_path, 5)
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 5" in printed, printed
    assert_same_run(tmp_path / "again", whole)


def test_where_it_is_not_correct_it_is_refused(tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        recipe = build_recipe(recipe_values(tmp_path, tmp_path, optim=OPTIM, **changes))
        with pytest.raises(RecipeError, match=message) as caught:
            resolve_ds_config(recipe, 2)
        assert "\n" not in str(caught.value)

    refused("offload_optimizer.*Muon.*zero0 to zero3", deepspeed={"config": "zero3_offload_optimizer"})
    refused("checkpoint.universal.*Muon", checkpoint={"universal": True})
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}), encoding="utf-8"
    )
    refused("offload_param.*Muon", deepspeed={"config": str(file)})
