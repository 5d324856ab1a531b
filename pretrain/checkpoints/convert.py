"""Checkpoints for starts that cannot read them as they are: another world size, another ZeRO stage."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

from mor_model.config import ModelConfig
from pretrain.checkpoints.restricted_loading import load_restricted, restricted_loading
from pretrain.errors import RunError
from pretrain.ranks.environment import clean_environment
from pretrain.records.run_folder import RunFolder


def to_universal(checkpoint: Path) -> Path:
    """Convert a checkpoint with DeepSpeed's own tool; returns the folder, which is whole or absent. One that is there
    already is made again: nothing tells whether it was made of this checkpoint's files.

    Raises:
        RunError: with the tool's last words, when it fails.
    """
    target = checkpoint.parent / f".{checkpoint.name}.universal"
    temporary = checkpoint.parent / f".{checkpoint.name}.converting"
    for leftover in (target, temporary):
        _remove(leftover)
    temporary.mkdir()
    written = temporary / target.name  # the tool writes a file beside it too
    command = [sys.executable, "-m", "pretrain.checkpoints.convert", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint.resolve()), "--output_folder", str(written.resolve())]
    # From here, so that it is this code that runs and no other folder `pretrain`.
    here = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=clean_environment(), cwd=here, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{checkpoint}: could not be converted to a universal checkpoint: {reason}")
    written.rename(target)
    shutil.rmtree(temporary)
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
        with contextlib.redirect_stdout(io.StringIO()), restricted_loading(checkpoint):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:
        file = sorted(checkpoint.glob("*model_states.pt"))[0]
        state = load_restricted(file, map_location="cpu")["module"]
    _remove(target)
    save_weights(target, state, config)
    return target


def _remove(folder: Path) -> None:
    """Remove what an earlier start, or somebody else, has left under a name; a link, not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _run_tool() -> None:
    """DeepSpeed's `ds_to_universal` with this process's arguments, restricted in what it loads."""
    from deepspeed.checkpoint import ds_to_universal

    multiprocessing.set_start_method("fork")  # its workers are to inherit the restriction
    arguments = ds_to_universal.parse_arguments()
    try:
        with restricted_loading(Path(arguments.input_folder)):
            ds_to_universal.main(arguments)
    except RunError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _run_tool()
