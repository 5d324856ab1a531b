"""Every ZeRO stage x checkpointing x accumulation x precision on offer, on two ranks against one plain process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.reference import plain_losses
from tests.pretrain.support import Workers, losses, recipe_values

STAGES = ("zero0", "zero1", "zero2", "zero3")
POLICIES = ("none", "recursion", "layer", "selective")
PRECISIONS = {"fp32": 2e-5, "bf16": 0.05, "bf16_autocast": 0.05}
COMBINATIONS = [
    combination
    for combination in itertools.product(STAGES, POLICIES, (1, 4), PRECISIONS)
    if (combination[0], combination[3]) != ("zero0", "bf16")
]


def twenty_steps(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return recipe_values(
        data,
        run,
        budget={"steps": 20},
        checkpoint={"every": 0},
        evaluation={"every": 0, "sequences": 1},
        **changes,
    )


@pytest.fixture(scope="module")
def plain(tiny_data: Path) -> list[float]:
    """Losses of one plain process, which all combinations share: they say how to compute, not what."""
    return plain_losses(twenty_steps(tiny_data, Path("nowhere")))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "activation_checkpointing", "micro_batch", "precision"), COMBINATIONS)
def test_twenty_steps_equal_plain_training(
    tmp_path: Path,
    tiny_data: Path,
    two_ranks: Workers,
    plain: list[float],
    stage: str,
    activation_checkpointing: str,
    micro_batch: int,
    precision: str,
) -> None:
    values = twenty_steps(
        tiny_data,
        tmp_path / "run",
        batch={"sequences": 8, "micro_batch": micro_batch, "sequence_length": 32},
        activation_checkpointing=activation_checkpointing,
        precision=precision,
        deepspeed={"config": stage},
    )
    found = losses(two_ranks.train(tmp_path, values))
    assert list(found.values()) == pytest.approx(plain, abs=PRECISIONS[precision])
