"""`pretrain/train.py` where something happens in an evaluation, or the clock is the test's; FAULT says what, as JSON.

signal_pass: {rank: n}: SIGTERM comes to that rank during its n-th forward pass of an evaluation, counted from 1;
fail_suite: ranks on which the questions of the suite `own` cannot be read; step_minutes: by rank, how long a step takes
by its clock; blind: ranks that see another run folder; gone_after: step after which the run folder is removed;
signal_export: SIGTERM comes to that rank while the final weights are written.

Every rank prints at its end how many forward passes evaluations made there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from mor_model.model import RecursiveTransformer
from pretrain import train
from pretrain.checkpoints import final_weights as export
from pretrain.checkpoints import store as checkpoint
from pretrain.checkpoints.store import TrainState
from pretrain.evaluation import evaluate
from pretrain.ranks import run_lock
from pretrain.training import loop
from pretrain.training.batches import StepBatch

FAULT = json.loads(os.environ["FAULT"])
RANK = os.environ.get("RANK", "0")
seen = SimpleNamespace(passes=0, minutes=0.0)


def forward(self: RecursiveTransformer, *arguments: Any, **keywords: Any) -> Any:
    if not self.training:
        seen.passes += 1
        if seen.passes == FAULT.get("signal_pass", {}).get(RANK):
            os.kill(os.getpid(), signal.SIGTERM)
    return sound_forward(self, *arguments, **keywords)


def own_suite(*arguments: Any) -> dict[str, Any]:
    if int(RANK) in FAULT.get("fail_suite", ()):
        raise OSError(errno.EIO, "the questions are on a disk that is gone")
    return sound_own_suite(*arguments)


def export_weights(*arguments: Any) -> None:
    if int(RANK) == FAULT.get("signal_export"):
        os.kill(os.getpid(), signal.SIGTERM)
    sound_export_weights(*arguments)


def forward_backward(
    self: loop.Trainer, state: TrainState, batch: StepBatch
) -> tuple[dict[str, torch.Tensor], float | None]:
    seen.minutes += FAULT.get("step_minutes", {}).get(RANK, 0.0)
    if state.step == FAULT.get("gone_after"):
        shutil.rmtree(self.recipe.run_folder)
    return sound_forward_backward(self, state, batch)


if __name__ == "__main__":
    sound_forward, RecursiveTransformer.forward = RecursiveTransformer.forward, forward  # type: ignore[method-assign]
    sound_export_weights, export.export_weights = export.export_weights, export_weights
    sound_own_suite, evaluate._SUITES["own"] = evaluate._SUITES["own"], own_suite
    sound_forward_backward, loop.Trainer._forward_backward = loop.Trainer._forward_backward, forward_backward  # type: ignore[method-assign]
    if "step_minutes" in FAULT:
        checkpoint.time = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: 60.0 * seen.minutes)  # type: ignore[attr-defined]
    if int(RANK) in FAULT.get("blind", ()):
        run_lock.sees = lambda *_: False
    code = train.main()
    print(f"rank {RANK} made {seen.passes} passes", flush=True)
    sys.exit(code)
