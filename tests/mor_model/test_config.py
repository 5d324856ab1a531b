"""Every impossible configuration is refused when it is built, in one sentence that names the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import mor_model
from mor_model.config import ModelConfig
from mor_model.errors import ConfigError

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
}
ROUTED: dict[str, Any] = {**SMALL, "sharing": "middle_cycle", "recursions": 3}


def routed(**router: Any) -> dict[str, Any]:
    return {**ROUTED, "router": router}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads do not divide the width": (
        {**SMALL, "num_heads": 5, "num_kv_heads": 5},
        r"hidden_size \(32\) is not a multiple of num_heads \(5\)",
    ),
    "key-value heads do not divide the heads": (
        {**SMALL, "num_kv_heads": 3},
        r"num_heads \(4\) is not a multiple of num_kv_heads \(3\)",
    ),
    "odd head": ({**SMALL, "head_dim": 7}, r"model\.head_dim: 7 is odd"),
    "no head width": ({**SMALL, "head_dim": 0}, r"model\.head_dim: must be a whole number"),
    "no layers": ({**SMALL, "num_layers": 0}, r"model\.num_layers: must be a whole number of at least 1, not 0"),
    "width as text": ({**SMALL, "hidden_size": "32"}, r"model\.hidden_size: must be a whole number"),
    "vocabulary true": ({**SMALL, "vocab_size": True}, r"model\.vocab_size: must be a whole number"),
    "recursions as a fraction": ({**ROUTED, "recursions": 1.5}, r"model\.recursions: must be a whole number"),
    "theta not a number": ({**SMALL, "rope_theta": "1e4"}, r"model\.rope_theta: must be a positive number"),
    "infinite deviation": ({**SMALL, "init_std": math.inf}, r"model\.init_std: must be a positive number"),
    "flag as text": ({**SMALL, "tie_embeddings": "yes"}, r"model\.tie_embeddings: must be true or false"),
    "unknown sharing": ({**SMALL, "sharing": "ring"}, r"model\.sharing: 'ring' is not one of"),
    "recursions without sharing": ({**SMALL, "recursions": 2}, "has one recursion, not 2"),
    "more recursions than layers": ({**ROUTED, "recursions": 7}, "nearest valid depths are 9"),
    "indivisible depth": ({**ROUTED, "num_layers": 9}, "nearest valid depths are 8 and 11"),
    "router without recursions": ({**SMALL, "router": {}}, "a router needs at least 2 recursions"),
    "router of an unknown kind": (routed(kind="expert"), r"model\.router\.kind: 'expert' is not one of"),
    "router as a word": ({**ROUTED, "router": "expert_choice"}, "'expert_choice' is not a router; give its fields"),
    "unknown router network": (routed(network="deep"), r"model\.router\.network: 'deep' is not one of"),
    "unknown gate": (routed(gate="softmax"), r"model\.router\.gate: 'softmax' is not one of"),
    "unknown causal rule": (routed(causal="top"), r"model\.router\.causal: 'top' is not one of"),
    "negative scale": (routed(alpha=-1.0), r"model\.router\.alpha: must be a finite number of at least 0"),
    "recursions without end": ({**SMALL, "sharing": "cycle", "recursions": 10**30}, "must be at most 1,024"),
    "a vocabulary without end": ({**SMALL, "vocab_size": 10**30}, "vocab_size: must be at most 16,777,216"),
    "more digits than Python writes": ({**SMALL, "num_layers": 10**5000}, "not a value that is too large to show"),
    "a number beyond every float": ({**SMALL, "rope_theta": 10**400}, "rope_theta: must be a positive number"),
    "a key without end": ({**SMALL, "x" * 10_000: 1}, r"unknown key 'x{199}\.\.\.; known keys are"),
    "scale that is none": (routed(alpha=math.nan), r"model\.router\.alpha: must be a finite number of at least 0"),
    "coefficient as text": (routed(z_loss="1e-3"), r"model\.router\.z_loss: must be a finite number"),
    "capacity of zero": (routed(capacities=[1.0, 0.5, 0.0]), r"capacities: each must lie in \(0, 1\], not 0\.0"),
    "capacity above one": (routed(capacities=[1.5, 0.5, 0.1]), r"capacities: each must lie in \(0, 1\], not 1\.5"),
    "capacity as text": (routed(capacities=["1", "1", "1"]), r"capacities: each must lie in \(0, 1\], not '1'"),
    "capacities as one number": (routed(capacities=0.5), "capacities: must be a list with one share per recursion"),
    "capacities that increase": (routed(capacities=[0.5, 0.2, 0.3]), "0.3 after 0.2; they may not increase"),
    "capacities for other recursions": (routed(capacities=[1.0, 0.5]), "2 values for 3 recursions"),
    "target depth out of reach": (routed(target_depth=3.5), "target_depth: must lie between 1 and 3 recursions"),
    "target depth as text": (routed(target_depth="2"), "target_depth: must be a number of recursion steps"),
    "coefficient without a target": (routed(target_depth_coefficient=0.5), "0.5 has no effect without a target_depth"),
    "loss on random scores": (routed(network="random", z_loss=0.1), "z_loss: 0.1 has no effect with random scores"),
    "auxiliary loss on random scores": (
        routed(network="random", causal_coefficient=0.5),
        "no effect with random scores",
    ),
    "token-choice, unknown gate": (routed(kind="token_choice", gate="tanh"), r"router\.gate: 'tanh' is not one of"),
    "token-choice, unknown balance": (routed(kind="token_choice", balance="free"), "'free' is not one of"),
    "token-choice, unknown combination": (routed(kind="token_choice", combine="both"), "'both' is not one of"),
    "balance coefficient without balance loss": (
        routed(kind="token_choice", balance="bias", balance_coefficient=0.5),
        "balance_coefficient: 0.5 has no effect with balance 'bias'",
    ),
    "bias rate without bias": (routed(kind="token_choice", bias_update_rate=0.5), "has no effect with balance 'loss'"),
    "option of the other router": (routed(kind="token_choice", capacities=[1.0]), "unknown key 'capacities'"),
    "unknown key sharing": ({**ROUTED, "kv_sharing": "all"}, r"model\.kv_sharing: 'all' is not one of"),
    "shared keys without a router": ({**ROUTED, "kv_sharing": "shared"}, "requires a router"),
    "shared keys of other layers": (
        {**routed(), "sharing": "middle_sequence", "kv_sharing": "hybrid"},
        "'hybrid' requires the same layers at every recursion",
    ),
    "shared keys of some tokens": (
        {**routed(capacities=[0.9, 0.5, 0.2]), "kv_sharing": "shared"},
        "the first of the router's capacities must be 1, not 0.9",
    ),
    "positions reset without documents": ({**SMALL, "reset_positions": True}, "set document_masking too"),
    "misspelt key": ({**SMALL, "hiden_size": 3}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
    "misspelt router key": (routed(alfa=1.0), "unknown key 'alfa'; did you mean 'alpha'"),
    "no mapping": ([1, 2], "model: must be a mapping"),  # type: ignore[dict-item]
    "missing key": ({k: v for k, v in SMALL.items() if k != "num_heads"}, "model: num_heads missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_configuration_is_refused_in_one_sentence(name):
    values, expected = REFUSED[name]
    with pytest.raises(ConfigError, match=expected) as refusal:
        ModelConfig.from_dict(values)
    message = str(refusal.value)
    assert message.startswith("model")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize("name", mor_model.__all__)
def test_every_public_name_can_be_loaded(name):
    assert getattr(mor_model, name).__name__ == name


@pytest.mark.parametrize(
    "values",
    [
        SMALL,
        ROUTED,
        {**SMALL, "head_dim": 16, "tie_embeddings": False, "document_masking": True, "reset_positions": True},
        routed(),
        routed(capacities=[1.0, 0.5, 0.5], causal="aux_router", gate="tanh", target_depth=2.0),
        routed(network="random"),
        routed(kind="token_choice", balance="bias", gate="sigmoid"),
        {**routed(kind="token_choice"), "kv_sharing": "shared"},
    ],
)
def test_a_configuration_survives_json(values):
    config = ModelConfig.from_dict(values)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_planned_capacities():
    assert ModelConfig.from_dict(SMALL).capacities == (1.0,)
    assert ModelConfig.from_dict(ROUTED).capacities == (1.0, 1.0, 1.0)
    assert ModelConfig.from_dict(routed()).capacities == pytest.approx((1, 2 / 3, 1 / 3))
    assert ModelConfig.from_dict(routed(kind="token_choice")).capacities == pytest.approx((1, 2 / 3, 1 / 3))
    assert ModelConfig.from_dict(routed(capacities=[0.9, 0.5, 0.25])).capacities == (0.9, 0.5, 0.25)
