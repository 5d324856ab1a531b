"""torch.compile: one graph without breaks, and no second compilation from step to step."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from tests.mor_model.cases import random_batch, small_config, small_model

EXPERT = ExpertChoiceConfig(z_loss=0.1, entropy=0.1, target_depth=2.0)
CASES = {
    "vanilla": {"sharing": "none", "recursions": 1, "num_layers": 2},
    "recursive": {},
    "expert": {"router": EXPERT},
    "expert-auxiliary-mlp": {"router": ExpertChoiceConfig(causal="aux_router", network="mlp")},
    "expert-random": {"router": ExpertChoiceConfig(network="random")},
    "expert-shared": {"router": EXPERT, "kv_sharing": "shared"},
    "expert-hybrid": {"router": EXPERT, "kv_sharing": "hybrid"},
    "expert-documents": {"router": EXPERT, "document_masking": True, "reset_positions": True},
}


def graphs_of_training(config, activation_checkpointing, backend, steps=3):
    torch._dynamo.reset()
    model, plain = small_model(config, activation_checkpointing), small_model(config, activation_checkpointing)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(steps):
        batch = random_batch(config, length=16, seed=step)
        compiled_loss, loss = compiled(**batch.arguments()).loss, plain(**batch.arguments()).loss
        compiled_loss.backward()
        loss.backward()
        torch.testing.assert_close(compiled_loss, loss)
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    return counter.frame_count


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-hybrid"])
def test_one_graph_for_all_steps(name):
    assert graphs_of_training(small_config(**CASES[name]), "none", "eager") == 1


def test_one_graph_with_checkpointing():
    assert graphs_of_training(small_config(router=EXPERT), "recursion", "aot_eager") == 1


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", ["none", "recursion", "layer", "selective"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_through_autograd(name, activation_checkpointing):
    assert graphs_of_training(small_config(**CASES[name]), activation_checkpointing, "aot_eager") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-documents"])
def test_one_graph_in_machine_code(name):
    assert graphs_of_training(small_config(**CASES[name]), "recursion", "inductor") == 1


def test_token_choice_compiles_no_more_once_it_has_met_its_shapes():
    """How many tokens go on differs from batch to batch; the number of compiled graphs must not follow it."""
    torch._dynamo.reset()
    config = small_config(router=TokenChoiceConfig(balance="none"))
    model, plain = small_model(config), small_model(config)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled, graphs, shapes = torch.compile(model, backend=counter), [], set()
    for step in range(16):
        batch = random_batch(config, length=64, seed=step)
        out = compiled(**batch.arguments(), return_routing=True)
        out.loss.backward()
        torch.testing.assert_close(out.loss, plain(**batch.arguments()).loss)
        graphs.append(counter.frame_count)
        shapes.add(tuple(step.selected_BN.shape[1] for step in out.routing.steps))
    assert len(shapes) > 4, "the comparison wants batches that differ"
    assert graphs[6] == graphs[-1]
