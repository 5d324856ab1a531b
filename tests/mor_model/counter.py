"""FLOPs as executed: torch's FlopCounterMode, taught CPU attention and how much of the square is causal.

Left to itself the counter takes CPU attention for free, and everywhere else counts the full square of queries and
keys. Here a call counts half of its full square, which is what its causal part is, or, where a mask tells documents
apart, the mask's open entries. Backward is two times forward (the kernel's own recomputation of scores is not counted).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention(by_mask: bool, factor: int) -> Callable[..., float]:
    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> float:
        square = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
        pairs = math.prod(square) / 2
        if by_mask and mask is not None:
            seen = mask if mask.dtype == torch.bool else mask == 0  # a kernel may be given 0 and -inf
            pairs = float(seen.expand(square).sum())
        return factor * 2 * pairs * (query.shape[-1] + value.shape[-1])

    return formula


def counted_flops(run: Callable[[], Any], by_mask: bool = False) -> float:
    """FLOPs of everything that `run` executes on the CPU, the backward pass included where it runs one.

    Args:
        by_mask: count the open entries of an attention mask, not half the square.
    """
    forward, backward = _attention(by_mask, 1), _attention(by_mask, 2)

    def on_forward(query, key, value, *rest, attn_mask=None, out_val=None, **options):
        return forward(query, key, value, attn_mask)

    def on_backward(gradient, query, key, value, *rest, attn_mask=None, out_val=None, **options):
        return backward(query, key, value, attn_mask)

    on_forward._get_raw = on_backward._get_raw = True  # tensors instead of their shapes
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: on_forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: on_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())
