"""Which keys a query may see, and the attention kernel that fits.

`Visibility` is decided once per recursion step and shared by all its layers. Without documents or padding no mask
exists at all: the plain triangle also serves routed tokens, because selected tokens are sorted. Otherwise a CPU uses
a dense mask with scaled-dot-product attention, and a GPU a block mask with FlexAttention, which skips fully masked
blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class Visibility(NamedTuple):
    """Who may see whom in one attention call; of the three at most one is set, and with none every key is visible.

    Attributes:
        causal: queries and keys are the same tokens in the same order, and each sees itself and what came before.
        dense: bool [B, 1, N, S], True where query n may see key s.
        blocks: the same as a FlexAttention block mask.
    """

    causal: bool = False
    dense: Tensor | None = None
    blocks: BlockMask | None = None


CAUSAL = Visibility(causal=True)
ALL = Visibility()


def visibility_among(documents_BN: Tensor | None) -> Visibility:
    """Causal visibility among tokens in sequence order.

    Args:
        documents_BN: integer group of each token; None when all belong together. A token sees earlier tokens of its
            own group only; padding is group -1, to which no real token belongs.
    """
    if documents_BN is None:
        return CAUSAL
    order_N = torch.arange(documents_BN.shape[1], device=documents_BN.device)
    return visibility_between(
        order_N.expand_as(documents_BN), order_N.expand_as(documents_BN), documents_BN, documents_BN
    )


def visibility_between(
    query_order_BN: Tensor, key_order_BS: Tensor, query_documents_BN: Tensor | None, key_documents_BS: Tensor | None
) -> Visibility:
    """Visibility of keys that are not the queries' own: a key is seen when it is not later and of the same document.

    Args:
        query_order_BN, key_order_BS: place of each token in its sequence.
        query_documents_BN, key_documents_BS: group of each token, or None for both when all belong together.
    """
    if query_order_BN.is_cuda:
        return Visibility(blocks=_block_mask(query_order_BN, key_order_BS, query_documents_BN, key_documents_BS))
    dense_BNS = query_order_BN[:, :, None] >= key_order_BS[:, None, :]
    if query_documents_BN is not None and key_documents_BS is not None:
        dense_BNS = dense_BNS & (query_documents_BN[:, :, None] == key_documents_BS[:, None, :])
    return Visibility(dense=dense_BNS[:, None])


def _block_mask(
    query_order_BN: Tensor, key_order_BS: Tensor, query_documents_BN: Tensor | None, key_documents_BS: Tensor | None
) -> BlockMask:
    def visible(b: Tensor, h: Tensor, n: Tensor, s: Tensor) -> Tensor:
        seen = query_order_BN[b, n] >= key_order_BS[b, s]
        if query_documents_BN is not None and key_documents_BS is not None:
            seen = seen & (query_documents_BN[b, n] == key_documents_BS[b, s])
        return seen

    (batch, queries), keys = query_order_BN.shape, key_order_BS.shape[1]
    return create_block_mask(visible, batch, None, queries, keys, device=query_order_BN.device)


@cache
def _compiled_flex_attention() -> Any:
    # Uncompiled FlexAttention materialises the whole score matrix.
    return torch.compile(flex_attention, dynamic=True)


def attend(query_BNHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, visibility: Visibility) -> Tensor:
    """Scaled dot-product attention with grouped queries.

    Args:
        query_BNHK: H query heads of N tokens.
        key_BSGK, value_BSGK: G key-value heads of S tokens; G divides H, and each serves H/G consecutive query heads.
        visibility: who sees whom.

    Returns:
        [B, N, H, K].
    """
    query, key, value = (x.transpose(1, 2) for x in (query_BNHK, key_BSGK, value_BSGK))
    grouped = query.shape[1] != key.shape[1]
    if visibility.blocks is not None:
        kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        out = kernel(query, key, value, block_mask=visibility.blocks, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visibility.dense, is_causal=visibility.causal, enable_gqa=grouped
        )
    return out.transpose(1, 2)
