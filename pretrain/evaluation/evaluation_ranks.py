"""Evaluation under a launcher: torchrun, srun, mpirun or deepspeed start `mor eval` on several ranks, which share the
work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def evaluation_ranks(device: str | None) -> Iterator[tuple[str, bool]]:
    """Join the launcher's process group where there is one; without a launcher this process works alone.

    Args:
        device: `cpu` or `cuda`; None is the accelerator where there is one.

    Yields:
        (device of this rank, whether this rank reports).

    Raises:
        UserError: another device, or `cuda` where there is none. LaunchError: the launcher's variables contradict one
            another or are incomplete, or the ranks do not meet.
    """
    import torch
    import torch.distributed as dist

    from pretrain.errors import UserError
    from pretrain.ranks.environment import discover_ranks, prepare_environment
    from pretrain.ranks.rendezvous import METHOD

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: is neither cpu nor cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use; leave the option out.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if discover_ranks().world_size == 1:
        yield device, True
        return
    ranks = prepare_environment()
    if device == "cuda":
        torch.cuda.set_device(ranks.device)
        device = f"cuda:{ranks.device}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", init_method=METHOD)
    try:
        yield device, ranks.rank == 0
    finally:
        dist.destroy_process_group()
