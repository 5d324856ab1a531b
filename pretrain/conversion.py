"""Checkpoints for starts that cannot read them as they are: another world size, another ZeRO stage."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mor_model.config import ModelConfig
from pretrain.environment import clean_environment
from pretrain.errors import RunError
from pretrain.run_folder import RunFolder


def to_universal(checkpoint: Path) -> Path:
    """Convert a checkpoint with DeepSpeed's own tool, once; returns the folder, which is whole or absent.

    Raises:
        RunError: with the tool's last words, when it fails.
    """
    target = checkpoint.parent / f".{checkpoint.name}.universal"
    if target.is_dir():
        return target
    temporary = checkpoint.parent / f".{checkpoint.name}.converting"
    shutil.rmtree(temporary, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(temporary)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{checkpoint}: could not be converted to a universal checkpoint: {reason}")
    temporary.rename(target)
    return target


def to_weights(checkpoint: Path, zero_stage: int) -> Path:
    """Write a checkpoint's weights in fp32 (master weights where there are any) beside it, as `mor_model.weights` does.

    Args:
        checkpoint: RUN/checkpoints/step-*; zero_stage: what it was written at.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from mor_model.weights import save_weights

    target = checkpoint.parent / f".{checkpoint.name}.weights"
    config = ModelConfig.from_dict(RunFolder(checkpoint.parents[1]).model())
    if zero_stage:
        with contextlib.redirect_stdout(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:
        file = sorted(checkpoint.glob("*model_states.pt"))[0]
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    save_weights(target, state, config)
    return target
