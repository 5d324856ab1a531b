"""Final weights in plain torch, gathered from however DeepSpeed has partitioned them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mor_model.config import ModelConfig
from pretrain.checkpoints.store import next_start
from pretrain.errors import RunError
from pretrain.ranks.agreement import on_first_rank


def export_weights(engine: Any, config: ModelConfig, folder: Path, checkpoints: Path) -> None:
    """Write model.safetensors and model.json in fp32 (master weights where there are any). Collective.

    Parameters are gathered one at a time; only rank 0 needs memory for all of them. `checkpoints` is
    looked into for what is left when the weights cannot be written.

    Raises:
        RunError: on all ranks, when rank 0 cannot write, or when a weight is not finite.
    """
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors import SafetensorError

    from mor_model.weights import save_weights

    first = dist.get_rank() == 0
    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = parameter if not engine.zero_optimization() else safe_get_full_fp32_param(parameter)
        if first:
            assert whole is not None
            state[name] = whole.detach().to("cpu", torch.float32, copy=True)
    state |= {name: buffer.detach().cpu() for name, buffer in engine.module.named_buffers()}

    def check() -> None:
        broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise RunError(
                f"{folder}: not written, because {len(broken)} of {len(state)} weights are not finite ({broken[0]}): "
                "training has diverged. Lower optim.lr in a new run_dir."
            )

    on_first_rank(check)

    def write() -> None:
        try:
            save_weights(folder, state, config)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise RunError(str(error)) from None

    try:
        on_first_rank(write)
    except RunError as error:
        raise RunError(
            f"{folder}: the final weights could not be written ({error}); make room and start the run again, which "
            f"{next_start(checkpoints)}."
        ) from None
