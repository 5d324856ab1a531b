"""Text generation: cached decoding under causal routing, with early exit for every token.

`advance` runs the network on the tokens that are new in each row of a batch, through the same recursion loop as
training. Only the layers' keys and values come from a cache, and rows that have nothing to do at a step are left out of
it. What it computes equals the full forward pass with `routing="causal"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mor_model.attention import ALL, Visibility
from mor_model.cache import DecodingCache, PlaceCache, PresentTokens
from mor_model.errors import ConfigError
from mor_model.layers import KVCache, Memory, Rotary, rotary
from mor_model.model import RecursiveTransformer
from mor_model.recursion import LayerRunner, Sequences, recurse
from mor_model.routing import (
    Decision,
    RoutingInputs,
    RoutingRecord,
    Selection,
    exact_dtype,
    gather_entries,
)


@dataclass(frozen=True)
class Generation:
    """Generated text, one entry per prompt.

    Attributes:
        tokens: ids that follow the prompt; the end-of-text id is the last one where it came.
        depths: for each of them, the recursion steps taken to predict it (by the token before it).
    """

    tokens: list[list[int]]
    depths: list[list[int]]


class _CachedRunner(LayerRunner):
    """Runs layers on the present tokens of some rows, with keys and values from a cache."""

    def __init__(self, model: RecursiveTransformer, cache: DecodingCache, rows_A: Tensor, dtype: torch.dtype) -> None:
        super().__init__(model.config, "none")
        self.shares_memory = False  # from step to step it is the cache that remembers
        self.cache, self.rows_A, self.dtype = cache, rows_A, dtype
        self.steps_begun = 0
        self.visibility: Visibility = ALL
        self.memories: Sequence[Memory | None] = ()
        self.caches: Sequence[KVCache | None] = ()

    def table(self, positions_AN: Tensor) -> Rotary:
        return rotary(positions_AN, self.head_width, self.theta, self.dtype)

    def place(
        self, layers: Sequence[nn.Module], place: PlaceCache, hidden_AND: Tensor, present: PresentTokens
    ) -> Tensor:
        """Layers of the prelude or the coda: every present token goes through."""
        if not layers:
            return hidden_AND
        visibility = place.extend(present)
        self.memories, self.caches = [None] * len(layers), place.layers
        return self.layers(layers, hidden_AND, self.table(present.positions_AN), visibility)[0]

    def step(
        self,
        layers: Sequence[nn.Module],
        hidden_BTD: Tensor,
        decision: Decision,
        sequences: Sequences,
        origin_BTD: Tensor | None,
        remembered: list[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, None]:
        """One recursion step on the rows that have a token in it; the others are not computed at all."""
        step, self.steps_begun = self.steps_begun, self.steps_begun + 1
        positions_BN = gather_entries(sequences.position, decision.selection.indices_BN)
        valid_BN = decision.selection.valid_BN
        if valid_BN is None:
            valid_BN = torch.ones_like(positions_BN, dtype=torch.bool)
        rows = valid_BN.any(1).nonzero().squeeze(1)
        if not len(rows):
            return hidden_BTD, None

        def of_rows(x: Tensor | None) -> Tensor | None:
            return x if x is None or len(rows) == len(hidden_BTD) else x[rows]

        present = PresentTokens(self.rows_A[rows], positions_BN[rows], valid_BN[rows])
        self.visibility, self.memories, self.caches = self.cache.open_step(step, present)
        selection = Selection(of_rows(decision.selection.indices_BN), of_rows(decision.selection.valid_BN))
        part = Decision(selection, of_rows(decision.weights_BN), of_rows(decision.last_BN))
        whole = Sequences(sequences.position[rows], None, self.table(present.positions_AN), self.visibility)
        after, _ = super().step(layers, hidden_BTD[rows], part, whole, of_rows(origin_BTD), None)
        return after if len(rows) == len(hidden_BTD) else hidden_BTD.index_copy(0, rows, after), None

    def _surroundings(
        self, selection: Selection, sequences: Sequences, reads_memory: bool
    ) -> tuple[Rotary, Visibility]:
        return sequences.rotary, sequences.visibility

    def layers(
        self,
        layers: Sequence[nn.Module],
        x_BND: Tensor,
        table: Rotary,
        visibility: Visibility,
        memories: Sequence[Memory] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        for layer, memory, cache in zip(layers, self.memories, self.caches):
            x_BND = layer(x_BND, table, visibility, memory, cache).hidden_BND
        return x_BND, []


@torch.no_grad()
def advance(
    model: RecursiveTransformer,
    cache: DecodingCache,
    rows_A: Tensor,
    tokens_AN: Tensor,
    valid_AN: Tensor,
    depth: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the network on new tokens and remember them.

    Args:
        cache: of a batch of B rows; is added to.
        rows_A: rows of the batch that have new tokens, ascending.
        tokens_AN: their new tokens, in order.
        valid_AN: False for padding, which may stand anywhere and changes nothing.
        depth: recursion steps that every token takes; None lets the router decide.

    Returns:
        (normalised hidden states [A, N, D], for `model.head`; recursion steps taken [A, N], 0 for padding).
    """
    config, schedule = model.config, model.config.schedule
    positions_AN = cache.lengths_B[rows_A, None] + valid_AN.cumsum(1) - 1
    cache.lengths_B[rows_A] += valid_AN.sum(1)
    present = PresentTokens(rows_A, positions_AN.clamp(min=0), valid_AN)
    hidden_AND = model.embedding(tokens_AN)
    runner = _CachedRunner(model, cache, rows_A, exact_dtype(hidden_AND.dtype))
    hidden_AND = runner.place([model.layers[i] for i in schedule.prelude], cache.prelude, hidden_AND, present)

    inputs = RoutingInputs(
        input_ids_BT=tokens_AN,
        position_T=present.positions_AN,
        valid_BT=valid_AN if present.padded else None,
        length_B=valid_AN.sum(1) if present.padded else None,
        causal=True,
        depth=depth,
        capacities=config.capacities,
    )
    sequences = Sequences(present.positions_AN, None, runner.table(present.positions_AN), ALL)
    steps = [[model.layers[i] for i in step] for step in schedule.steps]
    hidden_AND, _ = recurse(runner, steps, model.router, hidden_AND, sequences, inputs, RoutingRecord())
    hidden_AND = runner.place([model.layers[i] for i in schedule.coda], cache.coda, hidden_AND, present)
    depths_AN = cache.depth_at(rows_A, present.positions_AN).masked_fill(~valid_AN, 0)
    return model.final_norm(hidden_AND), depths_AN


@torch.no_grad()
def generate(
    model: RecursiveTransformer,
    prompt_ids: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    depth: int | None = None,
) -> Generation:
    """Continue every prompt.

    Args:
        prompt_ids: token ids of each prompt; lengths may differ.
        max_new_tokens: most tokens to add to each prompt.
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        top_k: sample among the k likeliest tokens; 0 among all.
        top_p: sample among the likeliest tokens that together hold this probability.
        seed: with the number of the prompt it fixes what is drawn, independently of the other prompts.
        vocab_size: size of the tokenizer, where the network's vocabulary is padded beyond it; an id from there on means
            no text and is never chosen. None takes the network's.
        eos_id: a row ends with this token; None never ends early.
        depth: recursion steps that every token takes; None lets the router decide.

    Raises:
        ConfigError: for an empty prompt, an id outside the vocabulary, a text longer than the context, or a number out
            of its range.
    """
    prompts = [list(map(int, prompt)) for prompt in prompt_ids]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, depth)
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"generate: vocab_size {vocab_size} leaves no token to choose.")
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    valid_AN = torch.tensor([[i < len(prompt) for i in range(longest)] for prompt in prompts], device=device)
    tokens_AN = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    draws_BT = torch.stack(
        [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + row))
            for row in range(len(prompts))
        ]
    ).to(device)

    cache = DecodingCache(model.config, len(prompts), device)
    rows_A = torch.arange(len(prompts), device=device)
    generation = Generation([[] for _ in prompts], [[] for _ in prompts])
    for step in range(max_new_tokens):
        hidden_AND, depths_AN = advance(model, cache, rows_A, tokens_AN, valid_AN, depth)
        last_A = valid_AN.sum(1) - 1
        each_A = torch.arange(len(rows_A), device=device)
        logits_AV = model.head(hidden_AND[each_A, last_A])[:, :vocab_size]
        next_A = pick_tokens(logits_AV, draws_BT[rows_A, step], temperature, top_k, top_p)
        for row, token, taken in zip(rows_A.tolist(), next_A.tolist(), depths_AN[each_A, last_A].tolist()):
            generation.tokens[row].append(token)
            generation.depths[row].append(taken)
        going = torch.ones_like(next_A, dtype=torch.bool) if eos_id is None else next_A != eos_id
        rows_A, tokens_AN = rows_A[going], next_A[going, None]
        valid_AN = torch.ones_like(tokens_AN, dtype=torch.bool)
        if not len(rows_A):
            break
    return generation


def pick_tokens(logits_AV: Tensor, draws_A: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token id per row.

    Args:
        logits_AV: scores of the vocabulary. draws_A: uniform numbers in [0, 1) that decide a sample.
        temperature, top_k, top_p: see `generate`.
    """
    if temperature == 0:
        return logits_AV.argmax(-1)
    logits_AV, order_AV = (logits_AV.double() / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits_AV = logits_AV[:, :top_k]
    probabilities_AV = logits_AV.softmax(-1)
    before_AV = probabilities_AV.cumsum(-1) - probabilities_AV
    # The likeliest token has nothing before it, so a choice always remains.
    kept_AV = probabilities_AV * (before_AV < top_p)
    up_to_AV = (kept_AV / kept_AV.sum(-1, keepdim=True)).cumsum(-1)
    place_A = (up_to_AV <= draws_A.double()[:, None]).sum(-1)
    place_A = place_A.minimum((kept_AV > 0).sum(-1) - 1)  # rounding may leave the last sum just below one
    return order_AV.gather(1, place_A[:, None]).squeeze(1)


def _check(
    model: RecursiveTransformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    depth: int | None,
) -> None:
    config = model.config
    if not prompts or max_new_tokens < 1:
        raise ConfigError("generate: give at least one prompt and max_new_tokens of at least 1.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"generate: prompt {number} is empty; begin it with at least one token.")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ConfigError(
                f"generate: prompt {number} has a token id outside the vocabulary of {config.vocab_size}; "
                "it was made by another tokenizer."
            )
        if len(prompt) + max_new_tokens > config.context_length:
            raise ConfigError(
                f"generate: prompt {number} has {len(prompt)} tokens and may grow by {max_new_tokens}, but the "
                f"model was trained on {config.context_length}; shorten the prompt or max_new_tokens."
            )
    if temperature < 0 or top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ConfigError("generate: temperature and top_k must be at least 0 and top_p in (0, 1].")
    if depth is not None and not 1 <= depth <= config.recursions:
        raise ConfigError(f"generate: depth {depth} is not between 1 and the model's {config.recursions} recursions.")
