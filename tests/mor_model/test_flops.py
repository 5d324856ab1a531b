"""Counted FLOPs and parameters against what torch executes and stores, and against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.flops import (
    by_kind,
    by_place,
    count_parameters,
    flops_per_sequence,
    flops_per_token,
    kv_bytes_per_token,
)
from mor_model.model import RecursiveTransformer
from tests.mor_model.counter import counted_flops


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_vanilla_counts_what_transformers_llama_executes(training):
    length = 96
    config = ModelConfig(
        vocab_size=192, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=160, head_dim=24
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_width,
            intermediate_size=config.intermediate_size,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    tokens = torch.arange(length)[None]

    def run():
        logits = llama(tokens, use_cache=False).logits
        if training:
            logits.sum().backward()

    flops = flops_per_sequence(config, length)
    assert (flops.training if training else flops.forward) == pytest.approx(counted_flops(run), rel=0.005)
    assert count_parameters(config).total_stored == llama.num_parameters()


SHAPE = {
    "vocab_size": 500,
    "hidden_size": 48,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 112,
    "sharing": "middle_cycle",
    "recursions": 3,
}
# Per token and layer, by hand: q and o are 48x48 each, k and v 48x24 each; the feed-forward has three 48x112 matrices.
QUERY_AND_OUTPUT, KEY_AND_VALUE, FEED_FORWARD = 2 * (2 * 48 * 48), 2 * (2 * 48 * 24), 2 * (3 * 48 * 112)
LAYER = QUERY_AND_OUTPUT + KEY_AND_VALUE + FEED_FORWARD


def model(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**SHAPE, **changes})


def test_recursion_wise_counts_active_tokens_in_every_layer():
    flops = flops_per_sequence(model(router={}), 90)
    assert by_place(flops.components) == pytest.approx(
        {
            "prelude": 90 * LAYER + 2 * 90 * 90 * 48,
            "recursion_1": 2 * (90 * LAYER + 2 * 90 * 90 * 48) + 2 * 48 * 90,
            "recursion_2": 2 * (60 * LAYER + 2 * 60 * 60 * 48) + 2 * 48 * 90,
            "recursion_3": 2 * (30 * LAYER + 2 * 30 * 30 * 48) + 2 * 48 * 60,
            "coda": 90 * LAYER + 2 * 90 * 90 * 48,
            "head": 2 * 90 * 500 * 48,
        }
    )
    assert flops.forward == pytest.approx(sum(by_kind(flops.components).values()))
    assert flops.training == pytest.approx(3 * flops.forward)


@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared", "hybrid"])
def test_documents_add_up(kv_sharing):
    config = model(router={}, kv_sharing=kv_sharing, document_masking=True)
    whole = flops_per_sequence(config, 90, document_lengths=[60, 30]).components
    apart = [flops_per_sequence(config, length).components for length in (60, 30)]
    assert whole == pytest.approx({name: sum(part[name] for part in apart) for name in whole})
    assert flops_per_sequence(config, 90, document_lengths=[90]) == flops_per_sequence(config, 90)


def test_flops_per_token_is_the_mean_over_a_sequence():
    config = model(router={})
    per_token, whole = flops_per_token(config, 90), flops_per_sequence(config, 90)
    assert per_token.forward == pytest.approx(whole.forward / 90)
    assert per_token.hardware("recursion") == pytest.approx(whole.hardware("recursion") / 90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"length": 90, "active": [90, 60]}, "active must give 3 numbers"),
        ({"length": 90, "active": [91, 60, 30]}, "between 0 and 90"),
        ({"length": 90, "document_lengths": [60, 31]}, "must be positive and sum to 90"),
        ({"length": 90, "document_lengths": [90, 0]}, "must be positive and sum to 90"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        flops_per_sequence(model(router={}), **arguments)
    with pytest.raises(ConfigError, match="'full' is not one of none, recursion, layer, selective"):
        flops_per_sequence(model(), 90).hardware("full")


def test_cache_bytes_shrink_as_the_paper_says():
    recursions, layers = 4, 8
    shape = {**SHAPE, "num_layers": layers, "sharing": "cycle", "recursions": recursions}
    vanilla = kv_bytes_per_token(ModelConfig.from_dict({**shape, "sharing": "none", "recursions": 1}))
    assert vanilla == layers * 2 * 2 * 12 * 2  # keys and values of 2 heads of 12 numbers of 2 bytes

    def ratio(**changes) -> float:
        return kv_bytes_per_token(ModelConfig.from_dict({**shape, **changes})) / vanilla

    assert ratio() == 1.0
    assert ratio(router={}) == pytest.approx((recursions + 1) / (2 * recursions))
    assert ratio(router={}, kv_sharing="shared") == pytest.approx(1 / recursions)
    assert ratio(router={}, kv_sharing="hybrid") == ratio(router={})


SHARING = {
    "vanilla": {"sharing": "none", "recursions": 1, "num_layers": 2},
    "cycle": {"sharing": "cycle", "recursions": 4, "num_layers": 4},
    "sequence": {"sharing": "sequence", "recursions": 2, "num_layers": 4},
    "middle_cycle": {"sharing": "middle_cycle", "recursions": 3, "num_layers": 5},
    "middle_sequence": {"sharing": "middle_sequence", "recursions": 2, "num_layers": 6},
}
ROUTERS = {
    "expert, linear": {},
    "expert, mlp": {"network": "mlp"},
    "expert, wide_mlp": {"network": "wide_mlp"},
    "expert, random": {"network": "random"},
    "expert, auxiliary linear": {"causal": "aux_router"},
    "expert, auxiliary mlp": {"network": "mlp", "causal": "aux_router"},
    "expert, auxiliary beside random": {"network": "random", "causal": "aux_router"},
    "expert, given capacities": {"capacities": [0.9, 0.45, 0.3]},
    "token": {"kind": "token_choice"},
    "token, mlp": {"kind": "token_choice", "network": "mlp"},
    "token, bias, code": {"kind": "token_choice", "balance": "bias", "combine": "code"},
}
EXECUTED = {
    **SHARING,
    **{name: {**SHARING["middle_cycle"], "router": router} for name, router in ROUTERS.items()},
    "expert, sequence": {**SHARING["sequence"], "router": {}},
    **{
        f"{router}, {mode}": {**SHARING["middle_cycle"], "router": ROUTERS[router], "kv_sharing": mode}
        for router in ("expert, linear", "token")
        for mode in ("shared", "hybrid")
    },
    "untied": {**SHARING["middle_cycle"], "router": {}, "tie_embeddings": False},
}


def executed(config, activation_checkpointing="none", training=True, documents=None, length=96, **forward):
    """(FLOPs that the network executes on two sequences, how many tokens each step ran on in each sequence)."""
    network = RecursiveTransformer(config, activation_checkpointing=activation_checkpointing)
    network.initialize(1)
    assert count_parameters(config).total_stored == sum(parameter.numel() for parameter in network.parameters())
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    output = []

    def run():
        output.append(network(tokens, tokens.roll(-1, 1), documents_BT=documents, return_routing=True, **forward))
        if training:
            output[0].loss.backward()

    with torch.set_grad_enabled(training):
        flops = counted_flops(run, by_mask=documents is not None)
    return flops, output[0].routing


def places(routing) -> list[int]:
    """Tokens each step computes, the places that fill a ragged selection up included."""
    return [step.selected_BN.shape[1] for step in routing.steps]


@pytest.mark.parametrize("name", EXECUTED)
def test_training_counts_what_every_network_executes(name):
    config = model(**EXECUTED[name])
    counted, routing = executed(config)
    assert 2 * flops_per_sequence(config, 96, active=places(routing)).training == pytest.approx(counted, rel=0.005)
    if "token" not in name:  # whose depths are not fixed beforehand
        assert 2 * flops_per_sequence(config, 96).training == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("activation_checkpointing", ["recursion", "layer", "selective"])
@pytest.mark.parametrize(
    "name", ["vanilla", "middle_cycle", "expert, linear", "expert, linear, shared", "token, hybrid"]
)
def test_hardware_counts_what_checkpointing_computes_again(name, activation_checkpointing):
    config = model(**EXECUTED[name])
    counted, routing = executed(config, activation_checkpointing)
    flops = flops_per_sequence(config, 96, active=places(routing))
    assert 2 * flops.hardware(activation_checkpointing) == pytest.approx(counted, rel=0.005)
    assert flops.hardware("none") == flops.training < 0.9 * flops.hardware(activation_checkpointing)


@pytest.mark.parametrize("name", ["vanilla", "expert, auxiliary mlp", "token, shared"])
def test_forward_counts_what_every_network_executes(name):
    config = model(**EXECUTED[name])
    counted, routing = executed(config, training=False)
    assert 2 * flops_per_sequence(config, 96, active=places(routing)).forward == pytest.approx(counted, rel=0.005)


def test_a_fixed_depth_is_counted_by_its_active_tokens():
    config = model(**SHARING["middle_cycle"], router={})
    counted, _ = executed(config, training=False, depth=2)
    active = [96, 96, 0]
    assert 2 * flops_per_sequence(config, 96, active=active).forward == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize(
    ("name", "activation_checkpointing"),
    [
        ("vanilla", "none"),
        ("vanilla", "recursion"),
        ("middle_cycle", "layer"),
        ("expert, linear", "none"),
        ("expert, linear", "recursion"),
        ("expert, linear, shared", "none"),
        ("expert, linear, hybrid", "none"),
    ],
)
def test_documents_count_the_pairs_their_mask_leaves(name, activation_checkpointing):
    """With documents the counter sees a mask, whose open entries it counts; here each document is a sequence."""
    config = model(**EXECUTED[name], document_masking=True)
    lengths = ([80, 31, 81], [10, 150, 32])
    documents = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in lengths])
    counted, routing = executed(config, activation_checkpointing, documents=documents, length=192)
    expected = 0.0
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            chosen = [step.selected_BN[row] for step in routing.steps]
            active = [int(((places >= start) & (places < start + length)).sum()) for places in chosen]
            expected += flops_per_sequence(config, length, active=active).hardware(activation_checkpointing)
            start += length
    assert expected == pytest.approx(counted, rel=0.005)
