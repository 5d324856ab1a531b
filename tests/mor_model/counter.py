"""FLOPs as executed: torch's FlopCounterMode, taught CPU attention and which query-key pairs a mask leaves.

Left to itself the counter takes CPU attention for free, and everywhere else counts the full square of queries and keys,
masked or not. Here it counts the pairs that the call's own arguments allow: of a causal call half the square, of a mask
its open entries. Backward is two times forward (the kernel's own recomputation of scores is not counted).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _pairs(query: torch.Tensor, key: torch.Tensor, is_causal: bool, mask: torch.Tensor | None) -> float:
    batch, heads, queries, keys = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    if mask is not None:
        assert not is_causal
        allowed = mask if mask.dtype == torch.bool else mask > -1e9
        return float(allowed.expand(batch, heads, queries, keys).sum())
    return batch * heads * queries * keys * (0.5 if is_causal else 1.0)


def _forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None, out_val=None) -> float:
    return 2 * _pairs(query, key, is_causal, attn_mask) * (query.shape[-1] + value.shape[-1])


def _backward(
    grad, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None, out_val=None
) -> float:
    return 2 * _forward(query, key, value, is_causal=is_causal, attn_mask=attn_mask)


_forward._get_raw = True  # type: ignore[attr-defined]
_backward._get_raw = True  # type: ignore[attr-defined]


def counted_flops(run: Callable[[], Any]) -> float:
    """FLOPs of everything that `run` executes on the CPU, the backward pass included where it runs one."""
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())
