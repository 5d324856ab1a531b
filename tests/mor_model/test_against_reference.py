"""The network in float64 against the slow reference: values, routing and gradients of every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from tests.mor_model import reference
from tests.mor_model.cases import Batch, random_batch, small_config, small_model


def compare(config: ModelConfig, batch: Batch, *, gradients: bool = False, **forward: Any) -> None:
    model = small_model(config, dtype=torch.float64)
    out = model(**batch.arguments(), **forward, return_logits=True, return_losses=True, return_routing=True)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference.forward(
        config, weights, batch.ids, batch.labels, valid=batch.valid, documents=batch.documents, **forward
    )
    if expected.closest < 1e-9:
        reject()
    tolerance = 1e-10
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.loss, expected.loss, **close)
    assert out.aux.keys() == expected.aux.keys()
    for name, value in expected.aux.items():
        torch.testing.assert_close(out.aux[name], value.detach(), **close)
    for b, row in enumerate(expected.logits):
        for t, logits in row.items():
            torch.testing.assert_close(out.logits_BTV[b, t], logits, **close)
            nll = expected.nll[b].get(t, torch.zeros((), dtype=torch.float64))
            torch.testing.assert_close(out.losses_BT[b, t], nll, **close)
        for t in range(batch.ids.shape[1]):
            assert out.routing.depth_BT[b, t] == expected.depth[b].get(t, 0)
    torch.testing.assert_close(out.stats["active_R"], torch.tensor(expected.active))
    if expected.agreement is not None:
        assert out.stats["sampling_accuracy"].item() == pytest.approx(expected.agreement, abs=1e-6)
    if gradients:
        out.loss.backward()
        if expected.loss.requires_grad:  # not where nothing is to be predicted and no router learns
            expected.loss.backward()
        for name, parameter in model.named_parameters():
            actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            wanted = torch.zeros_like(parameter) if weights[name].grad is None else weights[name].grad
            torch.testing.assert_close(
                actual, wanted, rtol=1e-6, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


ROUTERS: dict[str, Any] = {
    "unrouted": None,
    "expert": ExpertChoiceConfig(causal_coefficient=0.1),
    "expert-tanh-losses": ExpertChoiceConfig(gate="tanh", alpha=0.7, z_loss=0.2, entropy=0.3, target_depth=1.5),
    "expert-mlp-none": ExpertChoiceConfig(network="mlp", gate="none", alpha=0.3, capacities=(1.0, 0.5, 0.5)),
    "expert-wide-auxiliary": ExpertChoiceConfig(
        network="wide_mlp", causal="aux_router", causal_coefficient=0.2, target_depth=2.0, capacities=(0.9, 0.5, 0.2)
    ),
    "expert-random": ExpertChoiceConfig(network="random"),
    "token": TokenChoiceConfig(),
    "token-sigmoid-code": TokenChoiceConfig(gate="sigmoid", alpha=0.5, combine="code", z_loss=0.1, entropy=0.2),
    "token-mlp-bias": TokenChoiceConfig(network="mlp", balance="bias", target_depth=1.5, target_depth_coefficient=0.5),
    "token-random-none": TokenChoiceConfig(network="random", balance="none"),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_with_gradients(router, padded):
    config = small_config(router=ROUTERS[router])
    compare(config, random_batch(config, padded=padded), gradients=True)
    compare(config, random_batch(config, padded=padded, seed=1), routing="causal")
    compare(config, random_batch(config, padded=padded, seed=2), depth=2)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_sharing", ["shared", "hybrid"])
@pytest.mark.parametrize("router", ["expert", "token"])
def test_every_kv_sharing_with_gradients(router, kv_sharing, documents):
    config = small_config(
        router=ROUTERS[router], kv_sharing=kv_sharing, document_masking=documents, reset_positions=documents
    )
    compare(config, random_batch(config, padded=documents), gradients=True)
    compare(config, random_batch(config, seed=1), gradients=True, routing="causal")
    compare(config, random_batch(config, seed=2), depth=3)


@pytest.mark.parametrize(
    "fields",
    [
        {"sharing": "none", "recursions": 1, "router": None, "num_layers": 3, "tie_embeddings": False},
        {"sharing": "cycle", "num_layers": 6},
        {"sharing": "sequence", "num_layers": 6},
        {"sharing": "middle_sequence", "num_layers": 8, "num_kv_heads": 2, "head_dim": 6},
        {"document_masking": True},
        {"document_masking": True, "reset_positions": True, "rope_theta": 100.0},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_every_shape_with_gradients(fields):
    config = small_config(**{"router": ExpertChoiceConfig(), **fields})
    compare(config, random_batch(config, ignored=True), gradients=True)


def test_capacities_of_a_warm_up_replace_the_configured_ones():
    config = small_config(router=ExpertChoiceConfig(causal_coefficient=0.1))
    compare(config, random_batch(config), gradients=True, capacities=(1.0, 0.9, 0.7))


def routers(draw: st.DrawFn, recursions: int) -> Any:
    kind = draw(st.sampled_from(["none", "expert", "token"]))
    if kind == "none":
        return None
    network = draw(st.sampled_from(["linear", "mlp", "wide_mlp", "random"]))
    options: dict[str, Any] = {"network": network, "alpha": draw(st.sampled_from([0.1, 1.0]))}
    if network != "random":
        options["z_loss"] = draw(st.sampled_from([0.0, 0.1]))
        options["entropy"] = draw(st.sampled_from([0.0, 0.1]))
        options["target_depth"] = draw(st.sampled_from([None, 1.0, float(recursions)]))
    if kind == "token":
        balance = draw(st.sampled_from(["loss", "bias", "none"] if network != "random" else ["none"]))
        gate, combine = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.sampled_from(["paper", "code"]))
        return TokenChoiceConfig(gate=gate, combine=combine, balance=balance, **options)
    shares = draw(st.none() | st.lists(st.floats(0.05, 1.0), min_size=recursions, max_size=recursions))
    options["capacities"] = None if shares is None else tuple(sorted(shares, reverse=True))
    options["gate"] = draw(st.sampled_from(["sigmoid", "tanh", "none"]))
    options["causal"] = draw(st.sampled_from(["aux_loss", "aux_router"]))
    return ExpertChoiceConfig(**options)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, Batch, dict[str, Any]]:
    recursions = draw(st.integers(2, 4))
    sharing = draw(st.sampled_from(["cycle", "sequence", "middle_cycle", "middle_sequence"]))
    router = routers(draw, recursions)
    kv_sharing = "recursion_wise"
    first_takes_all = not isinstance(router, ExpertChoiceConfig) or router.capacities is None
    if router is not None and sharing.endswith("cycle") and first_takes_all:
        kv_sharing = draw(st.sampled_from(["recursion_wise", "shared", "hybrid"]))
    documents = draw(st.booleans())
    config = small_config(
        sharing=sharing,
        recursions=recursions,
        num_layers=recursions + (2 if sharing.startswith("middle") else 0),
        num_kv_heads=draw(st.sampled_from([1, 2])),
        tie_embeddings=draw(st.booleans()),
        router=router,
        kv_sharing=kv_sharing,
        document_masking=documents,
        reset_positions=documents and draw(st.booleans()),
    )
    batch = random_batch(
        config,
        sequences=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**20)),
        padded=draw(st.booleans()),
        ignored=draw(st.booleans()),
    )
    forward: dict[str, Any] = {"routing": draw(st.sampled_from(["topk", "causal"]))}
    forward["depth"] = draw(st.none() | st.integers(1, recursions))
    return config, batch, forward


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_combination(case):
    config, batch, forward = case
    compare(config, batch, **forward)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_very_many_combinations_with_gradients(case):
    config, batch, forward = case
    compare(config, batch, gradients=True, **forward)
