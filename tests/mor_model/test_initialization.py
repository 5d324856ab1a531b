"""Initial weights are a function of the seed and a parameter's name, with the documented spread."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from mor_model.config import ExpertChoiceConfig
from mor_model.model import RecursiveTransformer
from tests.mor_model.cases import small_config, small_model


def wide_config(**fields):
    return small_config(hidden_size=128, num_heads=4, intermediate_size=256, init_std=0.02, **fields)


def test_the_same_seed_gives_the_same_weights_in_any_state_of_the_generator():
    config = wide_config(router=ExpertChoiceConfig())
    torch.manual_seed(1)
    first = small_model(config, seed=3)
    torch.manual_seed(2)
    second, other = small_model(config, "layer", seed=3), small_model(config, seed=4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert name.endswith("norm.weight") or not torch.equal(parameter, other.get_parameter(name))
    weights = [parameter for name, parameter in first.named_parameters() if "norm" not in name]
    assert len({tuple(weight.flatten()[:4].tolist()) for weight in weights}) == len(weights)  # no two are alike


def test_spread():
    """Normal with init_std; what writes into the residual stream is divided by sqrt(2 x layer applications)."""
    config = wide_config(num_layers=20)
    for name, parameter in small_model(config).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
            continue
        writes = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        expected = 0.02 / math.sqrt(2 * 20) if writes else 0.02
        assert abs(parameter.std().item() / expected - 1) < 0.05, name
        assert abs(parameter.mean().item()) < 0.1 * expected, name


def test_the_residual_stream_grows_slower_than_the_root_of_depth():
    """The same stored layers applied once and twelve times; equal layers write alike, so their sum does grow."""
    sizes = []
    for recursions in (1, 12):
        config = wide_config(recursions=recursions, num_layers=4 * recursions, sharing="cycle")
        model, seen = small_model(config), []
        model.final_norm.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].std().item())
        )
        model(torch.arange(config.vocab_size)[None])
        sizes.append(seen[0])
    assert sizes[1] < 12**0.5 * sizes[0]


def test_gathering_is_asked_for_every_parameter_once():
    """What a partitioned model needs: each parameter written inside its own context."""
    model, gathered = RecursiveTransformer(small_config()), []
    model.initialize(0, lambda parameter: nullcontext(gathered.append(id(parameter))))
    assert gathered == [id(p) for p in model.parameters()]
