"""Attention backends see the same: dense masks on a CPU, block masks on a GPU, no mask where none is needed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mor_model import attention
from mor_model.attention import ALL, CAUSAL, Visibility, attend, visibility_among, visibility_between
from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from mor_model.layers import rotary, rotate
from tests.mor_model.cases import random_batch, small_config, small_model


def tensors(queries, keys, heads=4, kv_heads=2, seed=0, **to):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, queries, heads, 16), (2, keys, kv_heads, 16), (2, keys, kv_heads, 16))
    return [torch.randn(shape, generator=generator).to(**to) for shape in shapes]


def slow(query, key, value, visible):
    """Softmax over what `visible(b, n, s)` allows, one query and head at a time, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[2] // key.shape[2]
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        seen = [s for s in range(key.shape[1]) if visible(b, n, s)]
        scores = key[b, seen, h // group].double() @ query[b, n, h].double() / query.shape[-1] ** 0.5
        out[b, n, h] = scores.softmax(0) @ value[b, seen, h // group].double()
    return out


def test_causal_and_unmasked_attention():
    query, key, value = tensors(9, 9, dtype=torch.float64)
    torch.testing.assert_close(attend(query, key, value, CAUSAL), slow(query, key, value, lambda b, n, s: s <= n))
    torch.testing.assert_close(attend(query, key, value, ALL), slow(query, key, value, lambda b, n, s: True))


def groups(length=9):
    return torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1, 2][:length], [-1, -1, 0, 0, 0, 0, 3, 3, 3][:length]])


def test_attention_within_documents():
    query, key, value = tensors(9, 9, dtype=torch.float64)
    document = groups()
    expected = slow(query, key, value, lambda b, n, s: s <= n and document[b, s] == document[b, n])
    torch.testing.assert_close(attend(query, key, value, visibility_among(document)), expected)


PLACES = torch.tensor([[0, 3, 4, 8], [1, 2, 6, 7]])


def test_attention_to_keys_that_are_not_the_queries_own():
    query, key, value = tensors(4, 9, dtype=torch.float64)
    document, order = groups(), torch.arange(9).expand(2, 9)
    expected = slow(
        query, key, value, lambda b, n, s: s <= PLACES[b, n] and document[b, s] == document[b, PLACES[b, n]]
    )
    seen = visibility_between(PLACES, order, document.gather(1, PLACES), document)
    torch.testing.assert_close(attend(query, key, value, seen), expected)


def test_no_mask_is_built_where_the_triangle_is_enough():
    assert visibility_among(None) is CAUSAL
    assert visibility_among(groups()).dense.shape == (2, 1, 9, 9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_say_what_dense_masks_say(monkeypatch):
    """FlexAttention has no backward pass on a CPU, but its forward pass shows that the masks agree."""
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    query, key, value = tensors(9, 9)
    document, order = groups(), torch.arange(9).expand(2, 9)
    blocks = Visibility(blocks=attention._block_mask(order, order, document, document))
    expected = attend(query, key, value, visibility_among(document))
    torch.testing.assert_close(attend(query, key, value, blocks), expected)
    few = query[:, :4]
    blocks = Visibility(blocks=attention._block_mask(PLACES, order, document.gather(1, PLACES), document))
    expected = attend(few, key, value, visibility_between(PLACES, order, document.gather(1, PLACES), document))
    torch.testing.assert_close(attend(few, key, value, blocks), expected)
    blocks = Visibility(blocks=attention._block_mask(PLACES, order, None, None))
    expected = attend(few, key, value, visibility_between(PLACES, order, None, None))
    torch.testing.assert_close(attend(few, key, value, blocks), expected)


def test_rotation_depends_on_distance_alone():
    """Rotary embedding's defining property, and that position 0 turns nothing."""
    query, key, _ = tensors(1, 1, kv_heads=4, dtype=torch.float64)

    def product(query_place, key_place):
        tables = [rotary(torch.tensor([place]), 16, 100.0, torch.float64) for place in (query_place, key_place)]
        return (rotate(query, tables[0]) * rotate(key, tables[1])).sum(-1)

    torch.testing.assert_close(product(0, 0), (query * key).sum(-1))
    torch.testing.assert_close(product(7, 3), product(104, 100))
    assert (product(7, 3) - product(7, 4)).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared", "hybrid"])
@pytest.mark.parametrize("router", [ExpertChoiceConfig(alpha=1.0), TokenChoiceConfig()], ids=["expert", "token"])
def test_a_gpu_computes_what_a_cpu_computes(router, kv_sharing):
    config = small_config(
        router=router, kv_sharing=kv_sharing, document_masking=True, hidden_size=64, num_heads=4, num_kv_heads=2
    )
    batch = random_batch(config, sequences=2, length=256)
    results = []
    for device in ("cpu", "cuda"):
        model = small_model(config, device=device)
        out = model(
            **{k: None if v is None else v.to(device) for k, v in batch.arguments().items()}, return_logits=True
        )
        out.loss.backward()
        results.append([out.loss, out.logits_BTV, *(p.grad for p in model.parameters() if p.grad is not None)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-3, atol=1e-4)
