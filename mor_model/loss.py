"""The output head and its cross-entropy, chunk by chunk: the logits of a whole batch are never in memory at once.

The gradient with respect to the hidden states and the head is computed in the forward pass while a chunk's logits are
at hand, so that
nothing is recomputed: three matrix products per chunk, as for logits kept whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_LABEL = -100
# Elements of one chunk's logits: 128 MiB in fp32, large enough for a GPU's matrix units, small beside a laptop's
# memory.
CHUNK_ELEMENTS = 2**25


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        device = hidden_ND.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        weight = weight_VD.to(compute)
        losses_N = torch.empty(labels_N.shape, dtype=exact, device=hidden_ND.device)
        if with_gradient:
            hidden_gradient = torch.empty_like(hidden_ND)
            weight_gradient: Tensor | None = None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_ND.shape[0], chunk):
                part = slice(start, start + chunk)
                hidden, labels = hidden_ND[part].to(compute), labels_N[part]
                counted = labels != IGNORED_LABEL
                target = labels.where(counted, 0)[:, None]
                logits = F.linear(hidden, weight).to(exact)
                log_normalizer = logits.logsumexp(-1, keepdim=True)
                losses_N[part] = (log_normalizer - logits.gather(-1, target)).squeeze(-1).where(counted, 0.0)
                if with_gradient:
                    gradient = logits.sub_(log_normalizer).exp_()
                    gradient.scatter_add_(-1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
                    gradient = gradient.mul_(counted[:, None]).to(compute)
                    hidden_gradient[part] = (gradient @ weight).to(hidden_ND.dtype)
                    share = gradient.mT @ hidden
                    # A large vocabulary's gradient is passed over as seldom as can be: it is most of what moves here.
                    weight_gradient = share.to(exact) if weight_gradient is None else weight_gradient.add_(share)
        if with_gradient:
            if weight_gradient is None:
                weight_gradient = torch.zeros(weight_VD.shape, dtype=exact, device=hidden_ND.device)
            ctx.save_for_backward(hidden_gradient, weight_gradient)
            ctx.weight_dtype = weight_VD.dtype
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = outer[0]
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against labels without holding all logits.

    Args:
        hidden_ND: final hidden states of N tokens. weight_VD: the head. labels_N: token ids, -100 where nothing is to
            be predicted.
        chunk_tokens: tokens per chunk; None fits a chunk's logits into `CHUNK_ELEMENTS`.

    Positions without a label cost nothing where no gradient is wanted.

    Returns:
        (sum of the negative log-likelihoods in nats, differentiable; the N of them, detached, 0 where ignored), both
        at least fp32.
    """
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if with_gradient:
        total, losses_N = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk, True)
        return total, losses_N.detach()
    # An answer is scored after a long context without labels, and the head may be most of a small network.
    counted_N = labels_N != IGNORED_LABEL
    total, losses_M = _ChunkedCrossEntropy.apply(hidden_ND[counted_N], weight_VD, labels_N[counted_N], chunk, False)
    return total, losses_M.new_zeros(labels_N.shape).masked_scatter(counted_N, losses_M)


class Head(nn.Module):
    """Output head: logits, or the cross-entropy of labels. Its weight is the embedding's own parameter when
    embeddings are tied."""

    def __init__(self, hidden_size: int, vocab_size: int, tied: nn.Embedding | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size)) if tied is None else tied.weight

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V] without labels; else (sum of NLL, NLL of each token [B, T])."""
        if labels_BT is None:
            return F.linear(hidden_BTD, self.weight)
        total, losses_N = chunked_cross_entropy(hidden_BTD.flatten(0, 1), self.weight, labels_BT.flatten())
        return total, losses_N.view(labels_BT.shape)
