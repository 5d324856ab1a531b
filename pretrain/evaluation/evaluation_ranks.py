"""Evaluation on several ranks: joining a launcher's process group, and sharing forward passes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.ranks.lockstep import Lockstep

Batch = TypeVar("Batch")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def launched_ranks(device: str | None) -> Iterator[str]:
    """Join the process group of torchrun, srun, mpirun or deepspeed; without a launcher this process works alone.

    Args:
        device: `cpu` or `cuda`; None: the accelerator if there is one.

    Yields:
        This rank's device.

    Raises:
        UserError: another device, or `cuda` without a GPU. LaunchError: the launcher's variables are incomplete or
            contradict one another, or the ranks do not meet.
    """
    from pretrain.ranks.environment import discover_ranks, prepare_environment
    from pretrain.ranks.rendezvous import METHOD

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: is neither cpu nor cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use; leave the option out.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if discover_ranks().world_size == 1:
        yield device
        return
    place = prepare_environment().device
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=METHOD)
    try:
        yield f"cuda:{place}" if device == "cuda" else device
    finally:
        dist.destroy_process_group()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: its tensors cannot take part in ZeRO-3's gathering of partitioned parameters.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sum_over_ranks(
    model: Any,
    batches: Sequence[Batch],
    measure: Callable[[Batch, torch.Tensor], None],
    shape: tuple[int, ...],
    *,
    device: torch.device | None,
    lockstep: Lockstep,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Measure all batches, shared out over the ranks, in evaluation mode; the sum of what they add. Collective.

    Under ZeRO-3 a forward pass is a collective, so all ranks make the same number of passes: a rank that has no batch
    left measures the last one again, and the result does not count.

    Args:
        batches: alike on all ranks; batch i goes to rank i modulo the world size.
        measure: makes one forward pass and adds to the tensor that it is given.
        shape: of that tensor, which is float64 and starts at zero.
        lockstep: where the ranks meet before every pass.
        progress: told the number of batches done, and of all batches.
    """
    rank, world = rank_and_world()
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    with evaluating(model), lockstep.passes():
        for first in range(0, len(batches), world):
            lockstep.meet()
            counts = first + rank < len(batches)
            measure(batches[first + rank if counts else -1], sums if counts else torch.zeros_like(sums))
            if progress is not None:
                progress(min(first + world, len(batches)), len(batches))
        if world > 1:
            dist.all_reduce(sums)
    return sums
