"""What training may not depend on: how a batch is split, and in which precision a router decides."""

from __future__ import annotations

import pytest
import torch

from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from mor_model.errors import ConfigError
from mor_model.routing import ScoreNetwork, random_uniform
from tests.mor_model.cases import random_batch, small_config, small_model

LOSSES = {"z_loss": 0.2, "entropy": 0.1, "target_depth": 1.5, "target_depth_coefficient": 0.5}
ROUTERS = {
    "unrouted": None,
    "expert": ExpertChoiceConfig(causal_coefficient=0.5, **LOSSES),
    "expert-auxiliary": ExpertChoiceConfig(causal="aux_router", causal_coefficient=0.5, **LOSSES),
    "random": ExpertChoiceConfig(network="random"),
    "token": TokenChoiceConfig(**LOSSES),
    "token-sigmoid": TokenChoiceConfig(gate="sigmoid", **LOSSES),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_splitting_a_batch_changes_no_gradient(router, padded):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 sequences: mean losses and mean gradients are the same."""
    config = small_config(router=ROUTERS[router])
    batch = random_batch(config, sequences=8, padded=padded, ignored=True)
    results = []
    for parts in (1, 2, 4, 8):
        model = small_model(config, dtype=torch.float64)
        normalizer = (batch.labels != -100).sum() / parts
        loss = torch.zeros((), dtype=torch.float64)
        for part in range(parts):
            rows = batch.rows(part * 8 // parts, (part + 1) * 8 // parts)
            out = model(**rows.arguments(), loss_normalizer=normalizer)
            (out.loss / parts).backward()
            loss += out.loss.detach() / parts
        results.append([loss] + [p.grad for p in model.parameters() if p.grad is not None])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", ["linear", "mlp", "wide_mlp"])
@pytest.mark.parametrize("bf16", ["weights", "autocast"])
def test_router_arithmetic_is_fp32(network, bf16):
    """A score from bf16 weights or under autocast is what fp32 makes of the same hidden states."""
    config = small_config(router=ExpertChoiceConfig(network=network), hidden_size=64)
    model = small_model(config, dtype=torch.bfloat16 if bf16 == "weights" else torch.float32)
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
        for module in model.modules()
        if isinstance(module, ScoreNetwork)
    ]
    batch = random_batch(config, length=32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16 == "autocast"):
        routing = model(**batch.arguments(), return_routing=True).routing
    for hook in hooks:
        hook.remove()
    assert len(seen) == config.recursions
    for module, hidden, scores in seen:
        exact = ScoreNetwork(network, 64, 1).double()
        exact.load_state_dict(module.state_dict())
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), exact(hidden.double()), rtol=1e-4, atol=1e-4)
    assert all(step.weights_BN.dtype == torch.float32 for step in routing.steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_train(dtype):
    for router in (ROUTERS["expert"], ROUTERS["token"], None):
        config = small_config(router=router, init_std=0.02)
        model, batch = small_model(config, dtype=dtype), random_batch(config)
        out = model(**batch.arguments(), return_logits=True)
        assert out.loss.dtype == torch.float32 and out.logits_BTV.dtype == dtype
        out.loss.backward()
        exact = small_model(config)
        expected = exact(**batch.arguments()).loss
        torch.testing.assert_close(out.loss, expected, rtol=1e-2, atol=1e-2)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_learns():
    for router in (ROUTERS["expert-auxiliary"], ROUTERS["token"], ExpertChoiceConfig(network="mlp"), None):
        config = small_config(router=router, tie_embeddings=False)
        model, batch = small_model(config), random_batch(config)
        model(**batch.arguments()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_stored_layers_are_the_same_parameters_at_every_application():
    config = small_config(num_layers=8)
    model = small_model(config)
    called = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, i=index: called.append(i))
    model(**random_batch(config).arguments())
    assert tuple(called) == config.schedule.applications
    assert len(model.layers) == config.schedule.num_stored
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    assert model.head.weight is model.embedding.weight


def test_loss_free_balance_moves_the_choice_towards_depths_chosen_less():
    config = small_config(router=TokenChoiceConfig(balance="bias", bias_update_rate=0.005))
    model, batch = small_model(config), random_batch(config, sequences=8, length=32)
    before = model(**batch.arguments()).stats
    model.update_balance(torch.tensor([30.0, 20.0, 10.0]))
    model.update_balance(torch.tensor([30.0, 10.0, 20.0]))
    assert model.router.balance_steps_R.tolist() == [-2, 1, 1]
    for _ in range(40):
        model.update_balance(model(**batch.arguments()).stats["counts_R"])
    after = model(**batch.arguments()).stats
    assert before["balance"] > 0.15
    assert after["balance"] < 0.5 * before["balance"]
    assert model.to(torch.bfloat16).state_dict()["router.balance_steps_R"].dtype == torch.int64


def test_random_draws_are_even_and_unrelated():
    ids, positions = torch.arange(200)[:, None], torch.arange(500)[None]
    draws = torch.stack([random_uniform(ids, positions, salt) for salt in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    histogram = torch.histc(draws.double(), bins=20, min=0, max=1)
    assert (histogram / draws.numel() * 20 - 1).abs().max() < 0.03
    centred = draws.double() - 0.5
    for first, second in (
        (centred[0], centred[1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert (first * second).mean().abs() * 12 < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing": "future"}, "routing: 'future' is not"),
        ({"depth": 4}, "depth: 4 is not between 1 and the model's 3 recursions"),
        ({"depth": 0}, "depth: 0 is not between"),
        ({"capacities": (1.0, 0.5)}, "capacities: 2 values for 3 recursions"),
        ({"capacities": (1.0, 0.5, 0.6)}, "may not increase"),
        ({"capacities": (1.0, 0.5, 0.0)}, "must lie in"),
        ({"documents_BT": torch.zeros(2, 11, dtype=torch.long)}, "built without document_masking"),
        ({"document_masking": True}, "needs documents_BT"),
        ({"router": None, "capacities": (1.0, 1.0, 1.0)}, "only an expert-choice router"),
        ({"router": TokenChoiceConfig(), "capacities": (1.0, 1.0, 1.0)}, "only an expert-choice router"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    fields = {name: value for name, value in arguments.items() if name in ("router", "document_masking")}
    model = small_model(small_config(**{"router": ExpertChoiceConfig(), **fields}))
    forward = {name: value for name, value in arguments.items() if name not in fields}
    with pytest.raises(ConfigError, match=message):
        model(torch.zeros(2, 11, dtype=torch.long), **forward)
