"""Parameters, FLOPs and cache bytes of a network, counted from its configuration alone.

One convention everywhere, for the trainer's budget, the report and `mor flops`:

* A multiply-add is two FLOPs. Only matrix products count; norms, activation functions, rotary embeddings, softmax and
  the embedding lookup do not (as in the Mixture-of-Recursions paper, arXiv 2507.10524, appendix on FLOPs).
* Every APPLICATION of a layer counts, for the tokens that are active there. 6 x (stored parameters) would be wrong for
  shared layers and for routed tokens.
* Attention counts the causal half: a query attends to itself and what precedes it, n(n+1)/2 pairs, taken as n^2/2. With
  2 FLOPs for q.k and 2 for weighing v, n queries among m keys cost 2*n*m*H*K. A kernel that multiplies the full square
  does more work than is counted, and reads as a lower utilisation.
* With a document mask the squares become sums of squares over the documents.
* Training is three forward passes: backward is twice the forward, the gradients of inputs and of weights. Only an
  auxiliary router, which sees detached inputs, has none of the former. What activation checkpointing computes again is
  not a model FLOP; `FlopsCount.hardware` adds it.

Nothing here imports torch, so a plan or a report costs nothing to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mor_model.config import ModelConfig, TokenChoiceConfig
from mor_model.errors import ConfigError


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a network stores and applies.

    Attributes:
        embedding: V*D.
        head: V*D of an untied output head; 0 where it is tied to the embedding.
        layers: matrices of the stored layers (attention and feed-forward), each stored layer once.
        router: all routers, auxiliary ones included.
        norms: RMSNorm scales of the stored layers and of the output.
        total_stored: the sum of the above; what a checkpoint holds.
        non_embedding_stored: layers + router + norms. The paper's tables count so; an untied head is left out like the
            embedding.
        applied: non-embedding parameters, counted once per application for a token that takes every recursion step.
    """

    embedding: int
    head: int
    layers: int
    router: int
    norms: int
    total_stored: int
    non_embedding_stored: int
    applied: int


@dataclass(frozen=True)
class FlopsCount:
    """FLOPs of one sequence.

    Attributes:
        components: forward FLOPs by part, named `PLACE.KIND`: the place is `prelude`, `recursion_1` .. `recursion_R` or
            `coda`, the kind `projections` (q, k, v and output), `attention` (q.k and weighing v), `feed_forward` or
            `router`; `head` has no kind. Parts that a network lacks are left out.
        detached: FLOPs of a component that the backward pass saves because its inputs need no gradient.
        recomputation: forward FLOPs computed a second time, by checkpointing policy.
    """

    components: dict[str, float]
    detached: dict[str, float]
    recomputation: dict[str, float]

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return sum(self.components.values())

    @property
    def training(self) -> float:
        """FLOPs of a forward and a backward pass: what a budget and a model-FLOPs utilisation count."""
        return sum(self.training_components.values())

    @property
    def training_components(self) -> dict[str, float]:
        """`components` for a forward and a backward pass."""
        return {name: 3.0 * value - self.detached.get(name, 0.0) for name, value in self.components.items()}

    def hardware(self, activation_checkpointing: str) -> float:
        """FLOPs that a training step executes: `training` and what the checkpointing policy recomputes."""
        if activation_checkpointing not in self.recomputation:
            raise ConfigError(
                f"activation_checkpointing: {activation_checkpointing!r} is not one of {', '.join(self.recomputation)}."
            )
        return self.training + self.recomputation[activation_checkpointing]

    def __truediv__(self, divisor: float) -> FlopsCount:
        return FlopsCount(
            {name: value / divisor for name, value in self.components.items()},
            {name: value / divisor for name, value in self.detached.items()},
            {name: value / divisor for name, value in self.recomputation.items()},
        )


def by_kind(components: dict[str, float]) -> dict[str, float]:
    """`FlopsCount.components` (or `training_components`) summed over the places."""
    return _summed(components, -1)


def by_place(components: dict[str, float]) -> dict[str, float]:
    """`FlopsCount.components` (or `training_components`) summed over the kinds."""
    return _summed(components, 0)


def _summed(components: dict[str, float], part: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in components.items():
        key = name.split(".")[part]
        sums[key] = sums.get(key, 0.0) + value
    return sums


@dataclass(frozen=True)
class _LayerSizes:
    """Numbers in the matrices of one layer."""

    queries_and_output: int
    keys_and_values: int
    gate_and_up: int
    down: int

    @classmethod
    def of(cls, config: ModelConfig) -> _LayerSizes:
        width = config.head_width
        return cls(
            queries_and_output=2 * config.hidden_size * config.num_heads * width,
            keys_and_values=2 * config.hidden_size * config.num_kv_heads * width,
            gate_and_up=2 * config.hidden_size * config.intermediate_size,
            down=config.hidden_size * config.intermediate_size,
        )

    @property
    def total(self) -> int:
        return self.queries_and_output + self.keys_and_values + self.gate_and_up + self.down


@dataclass(frozen=True)
class _RouterSizes:
    """Numbers in the matrices of one step's routers; `detached` are those that read detached inputs."""

    total: int = 0
    detached: int = 0


def _router_sizes(config: ModelConfig) -> list[_RouterSizes]:
    """Sizes by recursion step (length R)."""
    router, width, recursions = config.router, config.hidden_size, config.recursions

    def matrices(network: str, outputs: int) -> tuple[int, int]:
        """Numbers in the matrix that reads the hidden states, and in the one after it."""
        hidden = {"mlp": width, "wide_mlp": 4 * width}.get(network)
        return (width * outputs, 0) if hidden is None else (width * hidden, hidden * outputs)

    if router is None:
        return [_RouterSizes()] * recursions
    learned = router.network != "random"
    if isinstance(router, TokenChoiceConfig):
        first = _RouterSizes(sum(matrices(router.network, recursions))) if learned else _RouterSizes()
        return [first] + [_RouterSizes()] * (recursions - 1)
    size = _RouterSizes(sum(matrices(router.network, 1)) if learned else 0)
    if router.causal == "aux_router":
        # Beside random scores the auxiliary router is the linear one.
        reading, behind = matrices(router.network if learned else "linear", 1)
        size = _RouterSizes(size.total + reading + behind, reading)
    return [size] * recursions


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count what the network stores and applies; see `ParameterCount` for what each number is."""
    schedule = config.schedule
    sizes = _LayerSizes.of(config)
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_embeddings else embedding
    layers = schedule.num_stored * sizes.total
    router = sum(size.total for size in _router_sizes(config))
    norms_per_layer = 2 * config.hidden_size
    norms = schedule.num_stored * norms_per_layer + config.hidden_size
    applied = len(schedule.applications) * (sizes.total + norms_per_layer) + config.hidden_size + router
    return ParameterCount(
        embedding=embedding,
        head=head,
        layers=layers,
        router=router,
        norms=norms,
        total_stored=embedding + head + layers + router + norms,
        non_embedding_stored=layers + router + norms,
        applied=applied,
    )


def flops_per_sequence(
    config: ModelConfig,
    length: int,
    *,
    active: Sequence[float] | None = None,
    document_lengths: Sequence[int] | None = None,
) -> FlopsCount:
    """FLOPs of one sequence of `length` tokens.

    Args:
        length: T, tokens in the sequence.
        active: tokens active at each recursion step (length R, each between 0 and T); the planned capacities times T
            when None. Means over many sequences may be given; attention is quadratic in them, so where the number
            varies from sequence to sequence (token-choice, causal routing) only the sum over single sequences is exact.
        document_lengths: tokens of each document of the sequence (sum T) where attention stays within documents; one
            document when None. Active tokens are taken to be spread evenly over them. Every part is additive over
            documents, so documents counted as sequences of their own sum to the count for any spread.

    Raises:
        ConfigError: when a number is out of its range; the message names it.
    """
    recursions = config.recursions
    if length < 1:
        raise ConfigError(f"FLOPs: length must be at least 1 token, not {length}.")
    if active is None:
        active = [capacity * length for capacity in config.capacities]
    if len(active) != recursions or not all(0 <= tokens <= length for tokens in active):
        raise ConfigError(
            f"FLOPs: active must give {recursions} numbers of tokens between 0 and {length}, not {list(active)}."
        )
    if document_lengths is not None and (sum(document_lengths) != length or min(document_lengths) < 1):
        raise ConfigError(
            f"FLOPs: document_lengths must be positive and sum to {length}, not {list(document_lengths)}."
        )
    # Share of the T^2/2 pairs that stay within a document.
    within = sum(n * n for n in document_lengths) / length**2 if document_lengths is not None else 1.0

    schedule = config.schedule
    sizes = _LayerSizes.of(config)
    attention_width = config.num_heads * config.head_width
    components: dict[str, float] = {}
    detached: dict[str, float] = {}
    recomputation = {"none": 0.0, "recursion": 0.0, "layer": 0.0, "selective": 0.0}

    def count_layers(place: str, layers: int, queries: float, keys: float, new_keys: float) -> float:
        """Add `layers` applications in which `queries` tokens attend to `keys`, of which `new_keys` are computed."""
        projections = layers * 2 * (queries * sizes.queries_and_output + new_keys * sizes.keys_and_values)
        attention = layers * 2 * queries * keys * attention_width * within
        gate_and_up, down = layers * 2 * queries * sizes.gate_and_up, layers * 2 * queries * sizes.down
        components[f"{place}.projections"] = projections
        components[f"{place}.attention"] = attention
        components[f"{place}.feed_forward"] = gate_and_up + down
        # A recomputation stops at the last input that the backward pass needs; the layer's own output is not one.
        recomputation["layer"] += projections + attention + gate_and_up
        recomputation["selective"] += projections + gate_and_up
        return projections + attention + gate_and_up + down

    if schedule.prelude:
        count_layers("prelude", len(schedule.prelude), length, length, length)
    candidates: float = length
    for step, (layers, tokens, router) in enumerate(zip(schedule.steps, active, _router_sizes(config))):
        place = f"recursion_{step + 1}"
        shared = config.kv_sharing != "recursion_wise" and step > 0
        new_keys = 0.0 if shared and config.kv_sharing == "shared" else tokens
        recomputation["recursion"] += count_layers(
            place, len(layers), tokens, active[0] if shared else tokens, new_keys
        )
        if config.router is None:
            recomputation["recursion"] -= 2 * tokens * sizes.down  # as above; a gate needs the step's output too
        if router.total:
            components[f"{place}.router"] = 2 * candidates * router.total
        if router.detached:
            detached[f"{place}.router"] = 2 * candidates * router.detached
        candidates = tokens
    if schedule.coda:
        count_layers("coda", len(schedule.coda), length, length, length)
    components["head"] = 2.0 * length * config.vocab_size * config.hidden_size
    return FlopsCount(components, detached, recomputation)


def flops_per_token(
    config: ModelConfig,
    length: int,
    *,
    active: Sequence[float] | None = None,
    document_lengths: Sequence[int] | None = None,
) -> FlopsCount:
    """`flops_per_sequence` divided by the length: the mean over the positions of a sequence."""
    return flops_per_sequence(config, length, active=active, document_lengths=document_lengths) / length


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> float:
    """Mean bytes of keys and values that one generated token adds to the cache, at the planned capacities.

    Recursion-wise, a token writes at the steps it takes; shared, at the first alone. Hybrid needs what recursion-wise
    needs: a later token reads a position's first keys at step 1 and its refreshed ones at step 2.
    """
    schedule = config.schedule
    applications: float = len(schedule.prelude) + len(schedule.coda)
    for step, (layers, capacity) in enumerate(zip(schedule.steps, config.capacities)):
        if step == 0 or config.kv_sharing != "shared":
            applications += capacity * len(layers)
    return applications * 2 * config.num_kv_heads * config.head_width * bytes_per_value
