"""Muon for the matrices inside the layers, AdamW for the rest, with the same result at every ZeRO stage.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the update of a weight matrix by the
nearest orthogonal one. That requires whole matrices, but ZeRO gives an optimiser flat pieces of them. Gradients arrive
summed over the ranks, unscaled and clipped, and momentum is elementwise, so only the last step differs from a single
process: the pieces of a matrix are gathered from all ranks, the matrix is orthogonalised, and each rank keeps its piece
of the result. DeepSpeed's own Muon orthogonalises before clipping, which a single process does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mor_model.config import ModelConfig

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


def orthogonalize(matrix_MN: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T: five Newton-Schulz iterations, which leave singular values near 1.

    Source: Jordan et al. 2024 (coefficients and iteration).

    Args:
        matrix_MN: [M, N], not changed; the iterations run in its precision.
    """
    a, b, c = _COEFFICIENTS
    x = matrix_MN.T if matrix_MN.shape[0] > matrix_MN.shape[1] else matrix_MN
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix_MN.shape[0] > matrix_MN.shape[1] else x


def is_hidden_matrix(name: str, shape: torch.Size) -> bool:
    """Whether Muon updates the parameter: a matrix inside a layer. Embedding, head, router and norms are AdamW's."""
    return name.startswith("layers.") and len(shape) == 2


def stacked_rows(name: str, shape: torch.Size, config: ModelConfig) -> tuple[int, ...]:
    """Rows of the linear maps that one stored matrix holds, each of which is orthogonalised by itself."""
    if name.endswith("attention.qkv.weight"):
        keys = config.num_kv_heads * config.head_width
        return (config.num_heads * config.head_width, keys, keys)
    if name.endswith("feed_forward.gate_up.weight"):
        return (config.intermediate_size, config.intermediate_size)
    return (shape[0],)


def iterated_in(*, on_cpu: bool) -> torch.dtype:
    """Precision of the iterations: bf16 on a GPU, as is usual; fp32 on a CPU, which has no faster way."""
    return torch.float32 if on_cpu else torch.bfloat16


def orthogonal_update(matrix_MN: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Each of the linear maps stacked in a matrix made orthogonal, in the size of AdamW's updates, [M, N]."""
    maps = matrix_MN.split(rows)
    return torch.cat([orthogonalize(map_) * (0.2 * math.sqrt(max(map_.shape))) for map_ in maps])


@dataclass(frozen=True)
class Piece:
    """What this rank keeps of one matrix in a flat tensor.

    Attributes:
        shape: of the whole matrix; rows: of the linear maps stacked in it.
        start: first element kept, in the flattened matrix; offset: where it lies in the flat tensor; count: elements
            kept, 0 where other ranks keep all of it.
    """

    shape: tuple[int, int]
    rows: tuple[int, ...]
    start: int
    offset: int
    count: int


class Muon(torch.optim.AdamW):
    """Muon in the groups that have a `momentum`, fused AdamW in the others.

    A linear map's update is 0.2 * sqrt(max(rows, columns)) times the orthogonal matrix, which gives it the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2); learning rate and weight decay then serve both.

    Args:
        groups: parameter groups; `momentum` marks Muon's.
        rows: `stacked_rows` of every parameter in Muon's groups, by id.
        betas, eps: AdamW's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rows: dict[int, tuple[int, ...]], *, betas: tuple[float, float], eps: float
    ) -> None:
        self._rows = rows
        self._partitioned = False
        self._pieces: dict[int, list[Piece]] = {}
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            for parameter in group["params"] if "momentum" in group else ():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                self._pieces[id(parameter)] = [self._piece(parameter, 0, 0, shape.numel())]

    def attach(self, engine: Any) -> None:
        """Learn where DeepSpeed has put the matrices; call once the engine exists, before the first step."""
        if not engine.zero_optimization():
            return
        zero = engine.optimizer
        # All ranks go through a group's matrices in this order, also through those of which they keep nothing.
        if engine.zero_optimization_stage() == 3:
            flat, members, place = zero.fp32_partitioned_groups_flat, zero.fp16_groups, _place_in_stage3
        else:
            flat, members, place = zero.single_partition_of_fp32_groups, zero.bit16_groups, _place_in_stage12
        pieces = {}
        for tensor, parameters in zip(flat, members):
            if id(parameters[0]) in self._rows:
                pieces[id(tensor)] = [self._piece(parameter, *place(parameter)) for parameter in parameters]
        self._pieces, self._partitioned = pieces, dist.get_world_size() > 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all groups. Under ZeRO collective: every rank steps the same groups in the same order."""
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups

    def _update(self, parameter: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            # Not used; AdamW asks for it in every state that it loads.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        momentum, gradient = state["momentum_buffer"], parameter.grad
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        # Nesterov's look-ahead
        wanted = gradient.lerp(momentum, group["momentum"]).view(-1)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        values = parameter.view(-1)
        for piece in self._pieces[id(parameter)]:
            kept = slice(piece.offset, piece.offset + piece.count)
            update = self._orthogonal_update(wanted[kept], piece)
            if update is not None:
                values[kept].add_(update, alpha=-group["lr"])

    def _orthogonal_update(self, wanted: torch.Tensor, piece: Piece) -> torch.Tensor | None:
        """This rank's piece of the update, None where it keeps nothing of the matrix."""
        kept = slice(piece.start, piece.start + piece.count)
        kind = iterated_in(on_cpu=not wanted.is_cuda)
        whole = torch.zeros(piece.shape[0] * piece.shape[1], dtype=kind, device=wanted.device)
        whole[kept] = wanted.to(kind)
        if self._partitioned:
            # Every element has one owner, so the sum is the matrix, exactly.
            dist.all_reduce(whole)
        if not piece.count:
            return None
        return orthogonal_update(whole.view(piece.shape), piece.rows).view(-1)[kept].to(wanted.dtype)

    def _piece(self, parameter: torch.Tensor, start: int, offset: int, count: int) -> Piece:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return Piece((shape[0], shape[1]), self._rows[id(parameter)], start, offset, count)


def _place_in_stage12(parameter: Any) -> tuple[int, int, int]:
    """Stages 1 and 2 lay a group's parameters end to end and cut the whole into equal parts."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0
    inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return inside.start, flat.start, flat.numel


def _place_in_stage3(parameter: Any) -> tuple[int, int, int]:
    """Stage 3 cuts every parameter by itself into as many equal parts as there are ranks, the last one padded."""
    zero = parameter._z3_optimizer
    _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    part = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank() * part, parameter.ds_numel)
    return start, offset, min(part, parameter.ds_numel - start)
