"""What every router is made of: score networks, selections, and means that do not depend on how a batch is split.

All arithmetic on scores is at least fp32, even with bf16 weights or under autocast: the rounding of a score to 8 bits
must not decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_model.config import RouterNetwork
from mor_model.layers import Projection


class Selection(NamedTuple):
    """Tokens that take a recursion step, N places for each sequence.

    Attributes:
        indices_BN: places in the sequence, ascending; None when all T tokens are taken in order. Where valid_BN is
            False it names a token that does not take the step, no token twice.
        valid_BN: False (always after the True ones) where a sequence has fewer than N tokens; for a selection of all
            tokens, False on padding. None when all places are real.
    """

    indices_BN: Tensor | None = None
    valid_BN: Tensor | None = None


class Decision(NamedTuple):
    """Who takes a recursion step, and how the block's output enters their state; see `mor_model.recursion`.

    Attributes:
        selection: the tokens.
        weights_BN: weight of the block's output, 0 where the selection is not valid; None replaces the state by it.
        last_BN: token-choice only: True where the step is the token's last.
    """

    selection: Selection = Selection()
    weights_BN: Tensor | None = None
    last_BN: Tensor | None = None


@dataclass(frozen=True)
class RoutingInputs:
    """What a router may look at besides hidden states, the same for all steps of a forward pass.

    Attributes:
        input_ids_BT, position_T: for pseudo-random scores.
        valid_BT: True on real tokens; None when all are.
        length_B: number of real tokens of each sequence; None when all T are.
        causal: decide without looking ahead.
        depth: steps that every token takes, without a decision; None leaves it to the router.
        capacities: share of the sequence each step takes when decided by top-k.
    """

    input_ids_BT: Tensor
    position_T: Tensor
    valid_BT: Tensor | None
    length_B: Tensor | None
    causal: bool
    depth: int | None
    capacities: tuple[float, ...]


@dataclass
class RoutingRecord:
    """What a router collects while it decides: weighted auxiliary losses, statistics and, on request, all scores."""

    keep_scores: bool = False
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    agreed: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    entropy: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    weights: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    scores_BT: list[Tensor] = field(default_factory=list)
    depth_B: list[Tensor] = field(default_factory=list)
    counts_R: Tensor | None = None

    def add_loss(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value)


def gather_rows(x_BTD: Tensor, indices_BN: Tensor | None) -> Tensor:
    """Rows of each sequence, [B, N, ...]; all of them, uncopied, for None."""
    if indices_BN is None:
        return x_BTD
    return x_BTD.flatten(0, 1).index_select(0, flat_rows(indices_BN, x_BTD.shape[1])).unflatten(0, indices_BN.shape)


def flat_rows(indices_BN: Tensor, length: int) -> Tensor:
    """Row numbers [B*N] of `indices_BN` in a [B*T, ...] view: selecting whole rows is far cheaper than elements."""
    batch = torch.arange(indices_BN.shape[0], device=indices_BN.device)
    return (indices_BN + length * batch[:, None]).flatten()


def gather_entries(x_BT: Tensor, indices_BN: Tensor | None) -> Tensor:
    """Entries of each sequence, [B, N]; all of them for None."""
    return x_BT if indices_BN is None else x_BT.gather(1, indices_BN)


def sequence_mean(values_BN: Tensor, counted_BN: Tensor | None) -> Tensor:
    """Mean over sequences of each sequence's mean over its counted entries (0 for a sequence that has none).

    With a mean over all tokens of a batch, the weight of a token would depend on the other sequences: gradient
    accumulation, micro-batch and world size would then change the gradient.
    """
    if counted_BN is None:
        return values_BN.mean()
    total_B = torch.where(counted_BN, values_BN, 0.0).sum(1)
    return (total_B / counted_BN.sum(1).clamp(min=1)).mean()


def binary_entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of a coin that falls with probability sigmoid(score)."""
    return F.softplus(scores) - scores * torch.sigmoid(scores)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the model is fp64."""
    return torch.promote_types(dtype, torch.float32)


def random_uniform(input_ids: Tensor, positions: Tensor, salt: int) -> Tensor:
    """Pseudo-random fp32 numbers in [0, 1), a pure function of (token id, position, salt).

    The random router draws from it instead of a generator, so that recomputation, another split of the batch and
    cached decoding see the same draw, and so that it never depends on other tokens. The mixing function is lowbias32
    (C. Wellons, hash-prospector), with products kept below 2**63.
    """
    mask = 0xFFFF_FFFF
    x = (input_ids.long() * 0x2545F491 + positions * 0x1B873593 + salt * 0x3C6EF372) & mask
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & mask
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & mask
    x = x ^ (x >> 15)
    return (x >> 8).to(torch.float32) / 2**24


class ScoreNetwork(nn.Module):
    """Hidden states [..., D] to scores [..., outputs] in at least fp32.

    `linear` has no bias (paper, section 2.2.1). `mlp` is D -> D -> outputs with GELU, `wide_mlp` D -> 4D -> outputs.
    """

    def __init__(self, network: RouterNetwork, hidden_size: int, outputs: int) -> None:
        super().__init__()
        width = {"mlp": hidden_size, "wide_mlp": 4 * hidden_size}.get(network)
        self.inner = None if width is None else Projection(hidden_size, width)
        self.score = Projection(width or hidden_size, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(exact_dtype(hidden.dtype))
            if self.inner is not None:
                x = F.gelu(self.inner(x, exact=True))
            return self.score(x, exact=True)


def select_top(scores_BN: Tensor, valid_BN: Tensor | None, k: int, k_B: Tensor | None) -> Selection:
    """The k highest scores of each sequence, in sequence order.

    Args:
        scores_BN: scores of the competing tokens. valid_BN: False where an entry does not compete; None when all do.
        k: places in the result. k_B: how many each sequence fills (<= k); None when all fill k.

    Returns:
        indices into the N entries, and which are filled.
    """
    if valid_BN is None or k_B is None:
        return Selection(scores_BN.topk(k, dim=1, sorted=False).indices.sort(dim=1).values)
    order_BK = scores_BN.masked_fill(~valid_BN, -torch.inf).topk(k, dim=1).indices
    places = scores_BN.shape[1]
    unfilled_BK = torch.arange(k, device=k_B.device) >= k_B[:, None]
    keys_BK = (order_BK + places * unfilled_BK).sort(dim=1).values
    return Selection(keys_BK % places, keys_BK < places)


def select_where(take_BN: Tensor) -> Selection:
    """The entries that are True, in order; N is as large as the fullest sequence needs.

    N is rounded up to a sixteenth of the sequence, so that kernels and compiled code meet few shapes, and is never 0:
    every process must run every step, with one place that holds no selection if need be.
    """
    tokens = take_BN.shape[1]
    counts_B = take_BN.sum(1)
    bucket = max(1, tokens // 16)
    places = min(tokens, max(1, -(-int(counts_B.max()) // bucket)) * bucket)
    indices_BN = torch.argsort(~take_BN, dim=1, stable=True)[:, :places]
    return Selection(indices_BN, torch.arange(places, device=take_BN.device) < counts_B[:, None])


def within(outer: Selection, inner: Selection) -> Selection:
    """A selection among the entries of another one, as places in the sequence."""
    if outer.indices_BN is None or inner.indices_BN is None:
        return inner if inner.indices_BN is not None else outer
    return Selection(outer.indices_BN.gather(1, inner.indices_BN), inner.valid_BN)
