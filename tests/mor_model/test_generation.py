"""Cached decoding against the full causal forward pass, for every router, key-value mode and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor_model.cache import DecodingCache
from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.flops import kv_bytes_per_token
from mor_model.generation import advance, generate, pick_tokens
from mor_model.model import RecursiveTransformer
from tests.mor_model.cases import enlarged

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "context_length": 64,
}
ROUTED = {**SHAPE, "sharing": "middle_cycle", "recursions": 3}
EXPERT: dict[str, Any] = {"alpha": 1.0}
TOKEN: dict[str, Any] = {"kind": "token_choice"}

MODELS: dict[str, dict[str, Any]] = {
    "vanilla": SHAPE,
    "recursive cycle": {**SHAPE, "sharing": "cycle", "recursions": 4},
    "recursive middle_sequence": {**SHAPE, "sharing": "middle_sequence", "recursions": 2},
    "expert": {**ROUTED, "router": EXPERT},
    "expert, fewer at first": {**ROUTED, "router": {**EXPERT, "capacities": [0.8, 0.6, 0.3]}},
    "expert, cycle, tanh, wide_mlp": {
        **SHAPE,
        "sharing": "cycle",
        "recursions": 4,
        "router": {**EXPERT, "gate": "tanh", "network": "wide_mlp"},
    },
    "expert, auxiliary router": {**ROUTED, "router": {**EXPERT, "causal": "aux_router"}},
    "expert, random": {**ROUTED, "router": {**EXPERT, "network": "random"}},
    "expert, shared": {**ROUTED, "router": EXPERT, "kv_sharing": "shared"},
    "expert, hybrid": {**ROUTED, "router": EXPERT, "kv_sharing": "hybrid"},
    "token": {**ROUTED, "router": TOKEN},
    "token, code, sigmoid": {**ROUTED, "router": {**TOKEN, "combine": "code", "gate": "sigmoid"}},
    "token, random": {**ROUTED, "router": {**TOKEN, "network": "random"}},
    "token, shared": {**ROUTED, "router": TOKEN, "kv_sharing": "shared"},
    "token, hybrid": {**ROUTED, "router": TOKEN, "kv_sharing": "hybrid"},
    "documents": {**ROUTED, "router": EXPERT, "document_masking": True, "reset_positions": True},
}


def built(name: str) -> RecursiveTransformer:
    """A network in float64 with weights large enough that every token's path and past make a difference."""
    return enlarged(ModelConfig.from_dict(MODELS[name]), 4.0, 0.1).double()


@torch.no_grad()
def whole(model: RecursiveTransformer, tokens: list[int], depth: int | None = None):
    """Logits [T, V] and depths [T] of the full causal forward pass of one text."""
    ids = torch.tensor([tokens])
    documents = torch.zeros_like(ids) if model.config.document_masking else None
    output = model(ids, documents_BT=documents, routing="causal", depth=depth, return_routing=True)
    return output.logits_BTV[0], output.routing.depth_BT[0].tolist()


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def fed(model, rows: list[list[int]], pieces: list[list[int]], depth: int | None = None, pad: str = "right"):
    """Feed each row in pieces of the given sizes (one list per call, one size per row; 0 leaves the row out)."""
    cache = DecodingCache(model.config, len(rows), torch.device("cpu"))
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    depths: list[list[int]] = [[] for _ in rows]
    done = [0] * len(rows)
    for sizes in pieces:
        present = [row for row, size in enumerate(sizes) if size]
        longest = max(sizes)
        tokens = torch.zeros(len(present), longest, dtype=torch.long)
        valid = torch.zeros(len(present), longest, dtype=torch.bool)
        for place, row in enumerate(present):
            span = slice(0, sizes[row]) if pad == "right" else slice(longest - sizes[row], longest)
            tokens[place, span] = torch.tensor(rows[row][done[row] : done[row] + sizes[row]])
            valid[place, span] = True
            done[row] += sizes[row]
        hidden, taken = advance(model, cache, torch.tensor(present), tokens, valid, depth)
        for place, row in enumerate(present):
            logits[row].append(model.head(hidden[place][valid[place]]))
            depths[row] += taken[place][valid[place]].tolist()
    assert done == [len(row) for row in rows]
    return [torch.cat(parts) for parts in logits], depths, cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "pieces",
    [
        [[9, 4, 14]] + [[1, 1, 1]] * 6 + [[1, 0, 1]] * 4 + [[1, 0, 0]] * 3,
        [[1, 1, 1]] * 10 + [[5, 0, 7], [0, 0, 7], [7, 0, 0]],
        [[22, 10, 24]],
    ],
    ids=["prompt, then tokens", "tokens, then pieces", "all at once"],
)
@pytest.mark.parametrize("pad", ["right", "left"])
def test_cached_logits_are_those_of_the_full_forward_pass(name, pieces, pad):
    model = built(name)
    rows = texts(22, 10, 24)
    logits, depths, _ = fed(model, rows, pieces, pad=pad)
    assert model.config.router is None or len(set().union(*depths)) >= 2, "the comparison needs different depths"
    for row, (row_logits, row_depths) in enumerate(zip(logits, depths)):
        expected, expected_depths = whole(model, rows[row])
        assert row_depths == expected_depths
        torch.testing.assert_close(row_logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["recursive cycle", "expert", "expert, shared", "token", "token, hybrid"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_fixed_depth_holds_in_decoding_too(name, depth):
    model = built(name)
    rows = texts(12, 7)
    logits, depths, _ = fed(model, rows, [[5, 3], [1, 1], [6, 3]], depth=depth)
    for row in range(2):
        torch.testing.assert_close(logits[row], whole(model, rows[row], depth)[0], rtol=1e-6, atol=1e-6)
        assert set(depths[row]) == {depth}


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert, shared", "expert, hybrid", "token"])
def test_the_cache_keeps_what_the_depths_say(name):
    model = built(name)
    rows = texts(20, 11)
    _, depths, cache = fed(model, rows, [[15, 6]] + [[1, 1]] * 5)
    config, schedule = model.config, model.config.schedule
    applications = len(schedule.prelude + schedule.coda) * 31
    for row_depths in depths:
        for taken in row_depths:
            kept = 1 if config.kv_sharing == "shared" else taken
            applications += kept * len(schedule.steps[0])
    assert cache.kept_values() == applications * 2 * config.num_kv_heads * config.head_width
    if name == "vanilla":
        assert cache.kept_values() * 2 == kv_bytes_per_token(config) * 31


def test_a_token_that_exits_early_is_not_computed(monkeypatch):
    model = built("expert")
    text = texts(40)[0]
    depths = whole(model, text)[1]
    calls: list[int] = []
    first = model.layers[model.config.schedule.steps[0][0]]
    first.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    fed(model, [text], [[1]] * 40)
    assert len(calls) == sum(depths) < 3 * 40
    assert set(calls) == {1}


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert, hybrid", "token, shared"])
def test_greedy_generation_continues_as_repeated_forward_passes_would(name):
    model = built(name)
    prompts = texts(3, 9, 1)
    generation = generate(model, prompts, max_new_tokens=12)
    for prompt, tokens, depths in zip(prompts, generation.tokens, generation.depths):
        text = list(prompt)
        for token, depth in zip(tokens, depths):
            logits, taken = whole(model, text)
            assert (token, depth) == (int(logits[-1].argmax()), taken[-1])
            text.append(token)
    assert [len(tokens) for tokens in generation.tokens] == [12, 12, 12]


def test_generation_ends_a_row_at_the_end_of_text():
    model = built("expert")
    prompts = texts(3, 9, 4)
    free = generate(model, prompts, max_new_tokens=12)
    eos = free.tokens[1][4]
    ended = generate(model, prompts, max_new_tokens=12, eos_id=eos)
    for expected, tokens, depths in zip(free.tokens, ended.tokens, ended.depths):
        end = expected.index(eos) + 1 if eos in expected else 12
        assert tokens == expected[:end]
        assert len(depths) == len(tokens)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_ids_beyond_the_tokenizers_are_never_chosen(options):
    """A vocabulary padded from 50 ids to 61, where the padding scores highest: the choice is as without it."""
    model = built("expert")
    prompts = [[token % 50 for token in text] for text in texts(5, 8, 3)]
    plain = generate(model, prompts, max_new_tokens=10, vocab_size=50, seed=1, **options).tokens
    with torch.no_grad():
        model.head.weight[50:] = 100.0 * model.head.weight[:11]
    assert any(token >= 50 for row in generate(model, prompts, max_new_tokens=10, **options).tokens for token in row)
    assert generate(model, prompts, max_new_tokens=10, vocab_size=50, seed=1, **options).tokens == plain
    assert all(token < 50 for row in plain for token in row)


def test_samples_depend_on_the_seed_and_not_on_the_batch():
    model = built("expert")
    prompts = texts(5, 8, 3)

    def sample(rows, seed):
        return generate(model, rows, max_new_tokens=10, temperature=1.3, seed=seed).tokens

    together = sample(prompts, 3)
    assert sample(prompts, 3) == together
    assert sample(prompts[:1], 3)[0] == together[0]
    assert sample(prompts, 4) != together


def test_sampling_follows_the_distribution_it_is_given():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])
    draws = torch.linspace(0, 1, 20_001)[:-1]

    def shares(**options):
        arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        picked = pick_tokens(logits.expand(len(draws), -1), draws, **arguments)
        return torch.bincount(picked, minlength=5) / len(draws)

    probabilities = logits[0].softmax(-1)
    torch.testing.assert_close(shares(), probabilities, atol=1e-4, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=1e-4, rtol=0)
    top_two = torch.where(torch.tensor([True, False, True, False, False]), probabilities, 0)
    torch.testing.assert_close(shares(top_k=2), top_two / top_two.sum(), atol=1e-4, rtol=0)
    assert 0.58 < probabilities[0] + probabilities[2] < 0.85
    torch.testing.assert_close(shares(top_p=0.58), top_two / top_two.sum(), atol=1e-4, rtol=0)
    torch.testing.assert_close(shares(top_p=1e-6), torch.tensor([1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(shares(temperature=0.0), torch.tensor([1.0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "at least one prompt"),
        ({"prompt_ids": [[1], []]}, "prompt 1 is empty"),
        ({"prompt_ids": [[1, 61]]}, "prompt 0 has a token id outside the vocabulary of 61"),
        ({"prompt_ids": [[1] * 60]}, "has 60 tokens and may grow by 8, but the model was trained on 64"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"temperature": -1.0}, "temperature and top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"depth": 4}, "depth 4 is not between 1 and the model's 3 recursions"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(built("expert"), **{"prompt_ids": [[1, 2]], "max_new_tokens": 8, **arguments})
