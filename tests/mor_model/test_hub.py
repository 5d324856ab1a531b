"""Interchange with transformers: vanilla is Llama, and what is exported loads without this project."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mor_model.config import ModelConfig
from mor_model.hub.configuration_mor import MorConfig
from mor_model.hub.llama import llama_config, to_llama
from mor_model.model import RecursiveTransformer
from tests.mor_model.cases import assert_near, enlarged

SHAPES = {
    "grouped heads": {"num_heads": 4, "num_kv_heads": 2},
    "own heads, untied": {"num_heads": 4, "num_kv_heads": 4, "tie_embeddings": False},
    "one key head, wide heads": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 20, "rope_theta": 5e4},
    "a cycle of one recursion, untied": {
        "num_heads": 6,
        "num_kv_heads": 2,
        "sharing": "cycle",
        "tie_embeddings": False,
        "norm_eps": 1e-6,
    },
}


def vanilla(name: str) -> ModelConfig:
    shape = {"vocab_size": 97, "hidden_size": 48, "num_layers": 3, "intermediate_size": 80, **SHAPES[name]}
    return ModelConfig.from_dict(shape)


def llama_of(model: RecursiveTransformer) -> LlamaForCausalLM:
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(model.config)))
    missing, unexpected = llama.load_state_dict(to_llama(model.state_dict(), model.config), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if model.config.tie_embeddings else [], [])
    llama.tie_weights()
    return llama


@pytest.mark.parametrize("name", SHAPES)
def test_vanilla_logits_and_gradients_are_llamas(name):
    model = enlarged(vanilla(name))
    llama = llama_of(model)
    tokens = torch.randint(97, (2, 34), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    expected = llama(inputs).logits
    output = model(inputs, labels, return_logits=True)
    assert_near(output.logits_BTV, expected)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert_near(output.loss, loss)

    loss.backward()
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = to_llama(gradients, model.config)
    compared = 0
    for parameter_name, parameter in llama.named_parameters():
        assert_near(gradients[parameter_name], parameter.grad)
        assert parameter.grad.abs().max() > 1e-4
        compared += 1
    assert compared == len(gradients) == 2 + 9 * 3 + (0 if model.config.tie_embeddings else 1)


@pytest.mark.parametrize("network", [{}, [], "x", {"vocab_size": 3}])
def test_an_exported_configuration_without_a_whole_network_is_refused_in_a_sentence(network):
    with pytest.raises(ValueError, match=r"config\.json: its network has no \w+; export the model again"):
        MorConfig(network=network)
