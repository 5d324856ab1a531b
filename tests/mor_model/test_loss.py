"""The chunked loss against torch's own on whole logits, and its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_model import loss as loss_module
from mor_model.loss import chunked_cross_entropy
from tests.mor_model.cases import random_batch, small_config, small_model
from tests.mor_model.live_memory import LiveBytes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**16))
def test_equals_cross_entropy_of_whole_logits(tokens, vocabulary, width, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    total, each = chunked_cross_entropy(hidden, weight, labels, chunk)
    ours = torch.autograd.grad(total * 0.3, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)
    theirs = torch.autograd.grad(expected.sum() * 0.3, (hidden, weight))
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        scored, each = chunked_cross_entropy(hidden, weight, labels, chunk)
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(scored, expected.detach().sum())


def test_scoring_spends_the_head_on_labels_alone(monkeypatch):
    rows = []
    linear = F.linear
    monkeypatch.setattr(loss_module.F, "linear", lambda x, w: rows.append(x.shape[0]) or linear(x, w))
    labels = torch.full((3, 20), -100)
    labels[1, 17:] = 4
    config = small_config()
    with torch.no_grad():
        small_model(config).head(torch.randn(3, 20, config.hidden_size), labels)
    assert rows == [3]


def test_whole_logits_are_never_in_memory():
    """Bytes beyond the gradients stay below a quarter of the logits', whatever the number of tokens."""
    tokens, vocabulary, width = 4096, 2048, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with LiveBytes() as live:
        total, _ = chunked_cross_entropy(hidden, weight, labels, 256)
        total.backward()
    assert live.peak < tokens * vocabulary * 4 / 4


def test_the_model_uses_chunks(monkeypatch):
    config = small_config()
    model, batch = small_model(config, dtype=torch.float64), random_batch(config)
    whole = model(**batch.arguments(), return_losses=True)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 5 * config.vocab_size)
    pieces = model(**batch.arguments(), return_losses=True)
    torch.testing.assert_close(pieces.loss, whole.loss)
    torch.testing.assert_close(pieces.losses_BT, whole.losses_BT)


def test_no_labels_at_all_is_a_loss_of_zero():
    config = small_config()
    model, batch = small_model(config), random_batch(config)
    out = model(batch.ids, torch.full_like(batch.ids, -100))
    assert out.loss.item() == 0.0 and out.lm_loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("normalizer", [7.0, torch.tensor(7.0)])
def test_the_normalizer_divides_the_sum(normalizer):
    config = small_config()
    model, batch = small_model(config), random_batch(config, ignored=True)
    out = model(**batch.arguments(), loss_normalizer=normalizer, return_losses=True)
    torch.testing.assert_close(out.loss, out.losses_BT.sum() / 7.0)
    torch.testing.assert_close(out.lm_loss, out.losses_BT.sum() / (batch.labels != -100).sum())
