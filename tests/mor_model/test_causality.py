"""Under causal routing the past never learns of the future; under top-k it does, and here that is on record."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from tests.mor_model.cases import random_batch, small_config, small_model

ROUTERS = {
    "none": None,
    **{f"expert-{n}": ExpertChoiceConfig(network=n) for n in ("linear", "mlp", "wide_mlp", "random")},
    "expert-first-routed": ExpertChoiceConfig(capacities=(0.6, 0.6, 0.3)),
    "expert-auxiliary": ExpertChoiceConfig(causal="aux_router"),
    **{f"token-{n}": TokenChoiceConfig(network=n, balance="none") for n in ("linear", "mlp", "wide_mlp", "random")},
}


def logits_with_another_future(model, batch, place, **forward):
    """Logits before `place`, of the batch and of the batch with every token from `place` on replaced."""
    other = batch.ids.clone()
    other[:, place:] = (other[:, place:] + 1 + place) % model.config.vocab_size
    with torch.no_grad():
        documents = {"documents_BT": batch.documents, "valid_BT": batch.valid, "routing": "causal", **forward}
        return model(batch.ids, **documents).logits_BTV[:, :place], model(other, **documents).logits_BTV[:, :place]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared", "hybrid"])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_logit_changes_before_a_changed_token(router, kv_sharing, documents):
    if kv_sharing != "recursion_wise" and router in ("none", "expert-first-routed"):
        return  # refused when the configuration is built
    config = small_config(router=ROUTERS[router], kv_sharing=kv_sharing, document_masking=documents)
    model = small_model(config, dtype=torch.float64)
    batch = random_batch(config, sequences=3, length=16)
    for place in (1, 5, 15):
        before, after = logits_with_another_future(model, batch, place)
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), length=st.integers(2, 24), data=st.data())
def test_no_logit_changes_at_any_length_or_place(seed, length, data):
    config = small_config(router=ExpertChoiceConfig(alpha=1.0))
    model = small_model(config, seed=seed, dtype=torch.float64)
    place = data.draw(st.integers(1, length - 1))
    before, after = logits_with_another_future(model, random_batch(config, length=length, seed=seed), place)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_topk_leaks_the_future_into_the_past():
    config = small_config(router=ExpertChoiceConfig())
    model = small_model(config, dtype=torch.float64)
    batch = random_batch(config, sequences=8, length=32)
    before, after = logits_with_another_future(model, batch, 16, routing="topk")
    changed = (before - after).abs().amax(-1) > 1e-9
    assert changed.any(1).float().mean() > 0.5, "top-k over a sequence must have looked at its future"


def test_token_choice_is_the_same_under_both_routings():
    config = small_config(router=TokenChoiceConfig())
    model, batch = small_model(config), random_batch(config)
    with torch.no_grad():
        topk, causal = (model(batch.ids, routing=routing).logits_BTV for routing in ("topk", "causal"))
    assert torch.equal(topk, causal)


def test_padding_changes_nothing():
    """A sequence padded on the right gives what it gives alone: no padding competes, is attended to, or counts."""
    for router in (ExpertChoiceConfig(z_loss=0.1, target_depth=2.0), TokenChoiceConfig(z_loss=0.1)):
        config = small_config(router=router)
        model = small_model(config, dtype=torch.float64)
        alone = random_batch(config, sequences=1, length=9)
        ids = torch.cat([alone.ids, torch.full((1, 6), 7)], dim=1)
        labels = torch.cat([alone.labels, torch.full((1, 6), -100)], dim=1)
        valid = torch.arange(15)[None] < 9
        expected = model(**alone.arguments(), return_logits=True)
        padded = model(ids, labels, valid_BT=valid, return_logits=True)
        torch.testing.assert_close(padded.logits_BTV[:, :9], expected.logits_BTV)
        torch.testing.assert_close(padded.loss, expected.loss)
