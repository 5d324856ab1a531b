"""The transformer block: RMSNorm, rotary positions, grouped-query attention, SwiGLU (the Llama family's layer).

Every module takes and returns tensors or tuples of tensors, so that ZeRO-3 can hook each of them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_model.attention import Visibility, attend
from mor_model.config import ModelConfig


class Rotary(NamedTuple):
    """Cosine and sine of the rotary angles, at least fp32: [N, K/2] for positions all sequences share, else [B, N,
    K/2]."""

    cos: Tensor
    sin: Tensor


def rotary(positions: Tensor, head_width: int, theta: float, dtype: torch.dtype = torch.float32) -> Rotary:
    """Rotary angles of token positions (Su et al. 2021, arXiv 2104.09864, eq. 15; channel i is paired with i + K/2).

    Args:
        positions: [N] or [B, N] true positions of the tokens, never their places in a compacted list.
        head_width: K.
        theta: base of the geometric series of frequencies.
        dtype: what the tables are computed in.
    """
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=dtype) / head_width
    angles = positions[..., None].to(dtype) * theta**-exponent
    return Rotary(angles.cos(), angles.sin())


def rotate(x_BNHK: Tensor, table: Rotary) -> Tensor:
    """Turn the channel pairs of every head by the angles of its token."""
    cos, sin = table.cos.unsqueeze(-2), table.sin.unsqueeze(-2)
    left, right = x_BNHK.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BNHK.dtype)


class KVCache(Protocol):
    """A cache of keys and values for one attention application: a stored layer has one for each recursion step.

    It keeps track of the places of the present tokens itself.
    """

    def update(self, key_BNGK: Tensor, value_BNGK: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the keys (rotated) and values of the present tokens; return all that are attended to, [B, S, G, K]
        each.

        The caller of the block passes the `Visibility` [B, 1, N, S] that fits what is returned.
        """
        ...


class Memory(NamedTuple):
    """Keys and values of an earlier recursion step, which this step's queries read.

    Attributes:
        key_BTGK, value_BTGK: rotated keys, and values, of all T tokens.
        slots_BN: None reads the memory as it is, and no keys or values are computed here (shared). Otherwise (hybrid)
            the place of each present token, whose entry its present key and value replace.
        written_BN: with slots_BN, False for places that hold no selection and must not be written; None for all True.
    """

    key_BTGK: Tensor
    value_BTGK: Tensor
    slots_BN: Tensor | None = None
    written_BN: Tensor | None = None


class AttentionOutput(NamedTuple):
    """Hidden states [B, N, D] and the keys and values [B, S, G, K] that were attended to."""

    hidden_BND: Tensor
    key_BSGK: Tensor
    value_BSGK: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4); statistics in at least
    fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Projection(nn.Linear):
    """A linear map without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, outputs: int | None = None, exact: bool = False) -> Tensor:
        """x [..., inputs] to [..., outputs].

        Args:
            outputs: number of outputs to compute, from the first.
            exact: convert the weight to x's precision.
        """
        weight = self.weight if outputs is None else self.weight[:outputs]
        return F.linear(x, weight.to(x.dtype) if exact else weight)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads (Ainslie et al. 2023, arXiv 2305.13245).

    `qkv` holds the query rows (H*K), then the key rows (G*K), then the value rows (G*K).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_width = config.num_heads, config.num_kv_heads, config.head_width
        self.qkv = Projection(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_width)
        self.output = Projection(config.num_heads * config.head_width, config.hidden_size)

    def forward(
        self,
        x_BND: Tensor,
        table: Rotary,
        visibility: Visibility,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> AttentionOutput:
        """Attend from N tokens to themselves, to a memory, or to what a cache returns.

        Args:
            x_BND: hidden states, normalised.
            table: rotary angles of the N tokens' true positions.
            visibility: which of the S keys each of the N queries sees.
            memory: keys and values of an earlier recursion step (training with shared or hybrid KV).
            cache: keys and values of earlier calls (decoding).
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        batch, tokens, _ = x_BND.shape
        if memory is not None and memory.slots_BN is None:
            query = rotate(self.qkv(x_BND, heads * self.head_width).view(batch, tokens, heads, self.head_width), table)
            key, value = memory.key_BTGK, memory.value_BTGK
        else:
            qkv = self.qkv(x_BND).view(batch, tokens, heads + 2 * kv_heads, self.head_width)
            query, key = rotate(qkv[:, :, : heads + kv_heads], table).split((heads, kv_heads), dim=2)
            value = qkv[:, :, heads + kv_heads :]
            if memory is not None:
                key = _refreshed(memory.key_BTGK, key, memory.slots_BN, memory.written_BN)
                value = _refreshed(memory.value_BTGK, value, memory.slots_BN, memory.written_BN)
            if cache is not None:
                key, value = cache.update(key, value)
        attended = attend(query, key, value, visibility)
        return AttentionOutput(self.output(attended.reshape(batch, tokens, heads * self.head_width)), key, value)


def _refreshed(old_BSGK: Tensor, new_BNGK: Tensor, slots_BN: Tensor | None, written_BN: Tensor | None) -> Tensor:
    assert slots_BN is not None
    index = slots_BN[..., None, None].expand_as(new_BNGK)
    if written_BN is not None:
        new_BNGK = torch.where(written_BN[..., None, None], new_BNGK, old_BSGK.gather(1, index))
    return old_BSGK.scatter(1, index, new_BNGK)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6). `gate_up` holds the gate's rows, then the values'."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Projection(config.hidden_size, 2 * config.intermediate_size)
        self.down = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BND).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then + feed_forward(norm(.))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BND: Tensor,
        table: Rotary,
        visibility: Visibility,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> AttentionOutput:
        """Same arguments as `Attention.forward`; x_BND is the residual stream."""
        attended, key, value = self.attention(self.attention_norm(x_BND), table, visibility, memory, cache)
        x_BND = x_BND + attended
        return AttentionOutput(x_BND + self.feed_forward(self.feed_forward_norm(x_BND)), key, value)
