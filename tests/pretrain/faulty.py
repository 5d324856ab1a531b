"""`pretrain/train.py` on a machine where something breaks; the variable FAULT says what, as JSON.

rank: where; nan_samples, spike_samples: batches that hold one of them lose their loss, or have it three times as large;
stall_samples: batches that hold one of them never come; kill_samples: the process dies in their second micro-batch;
full_step: checkpoints whose path holds this text meet a full disk; full_weights: so do the final weights; slow_step:
those are not written before the run has recorded the step `until`; stage: what `deepspeed.config: auto` comes to there.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mor_model import weights
from pretrain import train
from pretrain.checkpoints import checkpoint_engine as checkpoint_files
from pretrain.checkpoints.store import TrainState
from pretrain.ranks.environment import Ranks
from pretrain.recipe.recipe import Recipe
from pretrain.training import loop, prepare
from pretrain.training.batches import StepBatch
from pretrain.training.zero_stage import StageChoice, with_stage
from tests.pretrain.support import last_step

FAULT = json.loads(os.environ["FAULT"])


class FaultyEngine:
    """An engine whose losses are multiplied by a factor, and which ends the process in its second forward pass."""

    def __init__(self, engine: Any, factor: float, dies: bool) -> None:
        self._engine, self._factor, self._dies = engine, factor, dies
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._calls += 1
        if self._dies and self._calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        output = self._engine(*arguments, **keywords)
        return output._replace(loss=output.loss * self._factor, lm_loss=output.lm_loss * self._factor)


def forward_backward(
    self: loop.Trainer, state: TrainState, batch: StepBatch
) -> tuple[dict[str, torch.Tensor], float | None]:
    factor, dies = 1.0, False
    if self.ranks.rank == FAULT["rank"]:
        if set(batch.samples) & set(FAULT.get("nan_samples", ())):
            factor = float("nan")
        elif set(batch.samples) & set(FAULT.get("spike_samples", ())):
            factor = 3.0
        if set(batch.samples) & set(FAULT.get("stall_samples", ())):
            wait_for_a_disk_that_is_gone()
        dies = bool(set(batch.samples) & set(FAULT.get("kill_samples", ())))
    engine = self.engine
    self.engine = FaultyEngine(engine, factor, dies) if factor != 1.0 or dies else engine
    try:
        return sound_forward_backward(self, state, batch)
    finally:
        self.engine = engine


def wait_for_a_disk_that_is_gone() -> None:
    threading.Event().wait()


def save_hashed(state: Any, path: Path) -> dict[str, Any]:
    if FAULT.get("full_step", "none") in str(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left")
    if FAULT.get("slow_step", "none") in str(path):
        while last_step(path.parents[2]) < FAULT["until"]:
            time.sleep(0.01)
    return sound_save_hashed(state, path)


def save_weights(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def choose_stage(recipe: Recipe, ranks: Ranks) -> StageChoice:
    if "stage" not in FAULT or ranks.rank != FAULT["rank"]:
        return sound_choose_stage(recipe, ranks)
    chosen = sound_choose_stage(with_stage(recipe, FAULT["stage"]), ranks)
    return replace(chosen, automatic=True)


if __name__ == "__main__":
    sound_forward_backward, loop.Trainer._forward_backward = loop.Trainer._forward_backward, forward_backward  # type: ignore[method-assign]
    sound_save_hashed, checkpoint_files._save_hashed = checkpoint_files._save_hashed, save_hashed
    sound_choose_stage, prepare.choose_stage = prepare.choose_stage, choose_stage
    if "full_weights" in FAULT:
        weights.save_weights = save_weights
    sys.exit(train.main())
