"""Every checkpointing policy computes the same and keeps what it says."""

from __future__ import annotations

import pytest
import torch

from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from mor_model.errors import ConfigError
from mor_model.model import RecursiveTransformer
from tests.mor_model.cases import random_batch, small_config, small_model
from tests.mor_model.live_memory import LiveBytes

POLICIES = ("none", "recursion", "layer", "selective")
ROUTERS = {
    "unrouted": None,
    "expert": ExpertChoiceConfig(alpha=1.0),
    "random": ExpertChoiceConfig(network="random"),
    "token": TokenChoiceConfig(),
}


def loss_and_gradients(model, batch):
    model.zero_grad()
    out = model(**batch.arguments())
    out.loss.backward()
    return [out.loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared", "hybrid"])
@pytest.mark.parametrize("router", ROUTERS)
def test_policies_agree_to_the_last_bit(router, kv_sharing):
    if router == "unrouted" and kv_sharing != "recursion_wise":
        return  # refused when the configuration is built
    config = small_config(router=ROUTERS[router], kv_sharing=kv_sharing)
    batch = random_batch(config, padded=True)
    expected = loss_and_gradients(small_model(config), batch)
    for policy in POLICIES[1:]:
        for ours, theirs in zip(loss_and_gradients(small_model(config, policy), batch), expected, strict=True):
            assert torch.equal(ours, theirs), policy


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_policies_agree_under_autocast(policy):
    config = small_config(router=ROUTERS["expert"])
    batch = random_batch(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(small_model(config), batch)
        actual = loss_and_gradients(small_model(config, policy), batch)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("policy", POLICIES)
def test_recomputation_decides_nothing_again(router, policy, monkeypatch):
    """A decision taken again during the backward pass could differ, by a race or a bit; none is."""
    config = small_config(router=ROUTERS[router])
    model, batch = small_model(config, policy), random_batch(config)
    decided, decide = [], type(model.router).decide
    monkeypatch.setattr(type(model.router), "decide", lambda *args, **more: decided.append(1) or decide(*args, **more))
    loss = model(**batch.arguments()).loss
    assert len(decided) == config.recursions
    loss.backward()
    assert len(decided) == config.recursions


def bytes_of_step(config, policy, sequences=2, length=64):
    """(alive after the forward pass, peak of the backward pass beyond that)."""
    model, batch = small_model(config, policy), random_batch(config, sequences, length)
    with LiveBytes() as live:
        loss = model(**batch.arguments()).loss
        kept = live.now
        live.peak = live.now
        loss.backward()
    return kept, live.peak - kept


def recursive(recursions, layers=3, **fields):
    depth = layers * recursions + 2
    return small_config(recursions=recursions, num_layers=depth, hidden_size=32, num_heads=4, **fields)


def test_a_checkpointed_recursion_step_keeps_its_input_alone():
    """Bytes kept for each further recursion step: all inner activations without checkpointing, [B, T, D] with it."""
    hidden = 2 * 64 * 32 * 4
    inner = bytes_of_step(recursive(4), "none")[0] - bytes_of_step(recursive(3), "none")[0]
    assert inner > 30 * hidden
    assert bytes_of_step(recursive(4), "recursion")[0] - bytes_of_step(recursive(3), "recursion")[0] == hidden


def test_the_backward_pass_holds_one_recursion_step_at_a_time():
    """Its peak is one step's inner activations however many steps there are."""
    inner = bytes_of_step(recursive(4), "none")[0] - bytes_of_step(recursive(3), "none")[0]
    peaks = [bytes_of_step(recursive(recursions), "recursion")[1] for recursions in (2, 3, 6)]
    assert peaks[0] == peaks[1] == peaks[2]
    assert peaks[0] < 1.5 * inner


@pytest.mark.parametrize("router", ["expert", "token"])
def test_what_each_policy_keeps(router):
    config = recursive(3, layers=10, router=ROUTERS[router], intermediate_size=96)
    kept = {policy: bytes_of_step(config, policy)[0] for policy in POLICIES}
    assert kept["layer"] < kept["selective"] < 0.2 * kept["none"]
    # The prelude and coda layers keep everything under `recursion`: 2 of these 32.
    assert kept["recursion"] < 0.2 * kept["none"]


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        ConfigError, match="activation_checkpointing: 'full' is not one of none, recursion, layer, selective"
    ):
        RecursiveTransformer(small_config(), "full")


def test_nothing_is_kept_without_gradients():
    config = recursive(3)
    model, batch = small_model(config, "selective"), random_batch(config)
    with torch.no_grad(), LiveBytes() as live:
        loss = model(**batch.arguments()).loss
        assert live.now < 1000
    assert loss.grad_fn is None
