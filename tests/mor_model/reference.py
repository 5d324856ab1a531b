"""The network once more, written from the formulas: float64, one token at a time, no batching, no masks, no compaction.

A token is a dictionary key (its position), padding does not exist, a document is a number, and every sum is a loop. It
shares nothing with the package but the names of the weights and the configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig

Vectors = dict[int, Tensor]


@dataclass
class Result:
    """Of a batch: loss (differentiable), weighted auxiliary losses, and per sequence what each position got.

    `closest` is the smallest difference between two scores that decided which of two tokens top-k took; near zero,
    rounding decides (equal tokens of one document have equal states).
    """

    loss: Tensor
    aux: dict[str, Tensor]
    logits: list[Vectors]
    nll: list[Vectors]
    depth: list[dict[int, int]]
    active: list[float]
    agreement: float | None
    closest: float


@dataclass
class Sequence:
    """One sequence without its padding."""

    tokens: list[int]
    ids: dict[int, int]
    document: dict[int, int]
    rotary_position: dict[int, int]
    depth: dict[int, int] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    agreed: list[bool] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)


def forward(
    config: ModelConfig,
    weights: dict[str, Tensor],
    ids: Tensor,
    labels: Tensor,
    *,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    routing: str = "topk",
    depth: int | None = None,
    capacities: tuple[float, ...] | None = None,
    balance_steps: list[int] | None = None,
) -> Result:
    network = Network(config, weights, routing, depth, capacities or config.capacities, balance_steps)
    logits, nll, sequences = [], [], []
    for b in range(ids.shape[0]):
        tokens = [t for t in range(ids.shape[1]) if valid is None or valid[b, t]]
        document = {t: 0 if documents is None else int(documents[b, t]) for t in tokens}
        position = {}
        for t in tokens:
            first = t
            while config.reset_positions and first > 0 and int(documents[b, first - 1]) == document[t]:
                first -= 1
            position[t] = t - first if config.reset_positions else t
        sequence = Sequence(tokens, {t: int(ids[b, t]) for t in tokens}, document, position)
        sequences.append(sequence)
        logits.append(network.run(sequence))
        nll.append({})
        for t in tokens:
            if labels[b, t] != -100:
                nll[b][t] = logits[b][t].exp().sum().log() - logits[b][t][int(labels[b, t])]
    values = [value for row in nll for value in row.values()]
    loss = sum(values, torch.zeros((), dtype=torch.float64)) / max(1, len(values))
    aux: dict[str, Tensor] = {}
    for sequence in sequences:
        for name, terms in sequence.losses.items():
            aux[name] = aux.get(name, torch.zeros((), dtype=torch.float64)) + sum(terms) / len(sequences)
    total = max(1, sum(len(sequence.tokens) for sequence in sequences))
    steps_run = config.recursions if depth is None else depth
    active = [sum(s.step_tokens[r] for s in sequences if s.step_tokens) / total for r in range(steps_run)]
    active += [0.0] * (config.recursions - steps_run)
    agreed = [value for sequence in sequences for value in sequence.agreed]
    agreement = sum(agreed) / len(agreed) if agreed else None
    closest = min((margin for sequence in sequences for margin in sequence.margins), default=math.inf)
    depths = [sequence.depth for sequence in sequences]
    return Result(loss + sum(aux.values()), aux, logits, nll, depths, active, agreement, closest)


class Network:
    def __init__(self, config, weights, routing, depth, capacities, balance_steps):
        self.config, self.weights = config, weights
        self.routing, self.fixed_depth, self.capacities = routing, depth, capacities
        self.balance_steps = balance_steps

    def run(self, sequence: Sequence) -> Vectors:
        config, weights = self.config, self.weights
        hidden = {t: weights["embedding.weight"][sequence.ids[t]] for t in sequence.tokens}
        for layer in config.schedule.prelude:
            hidden = self.block(layer, sequence, hidden, {})
        if isinstance(config.router, ExpertChoiceConfig):
            hidden = self.expert_choice(sequence, hidden)
        elif isinstance(config.router, TokenChoiceConfig):
            hidden = self.token_choice(sequence, hidden)
        else:
            for r in range(self.fixed_depth or config.recursions):
                hidden = self.shared_block(r, sequence, hidden, {})
                sequence.step_tokens.append(len(sequence.tokens))
            sequence.depth = dict.fromkeys(sequence.tokens, self.fixed_depth or config.recursions)
        for layer in config.schedule.coda:
            hidden = self.block(layer, sequence, hidden, {})
        head = weights["embedding.weight"] if config.tie_embeddings else weights["head.weight"]
        return {t: head @ self.norm("final_norm", x) for t, x in hidden.items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] * x / ((x * x).sum() / len(x) + self.config.norm_eps).sqrt()

    def rotated(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        out = []
        for i in range(len(x)):
            angle = position * self.config.rope_theta ** (-(2 * (i % half)) / len(x))
            partner = -x[i + half] if i < half else x[i - half]
            out.append(x[i] * math.cos(angle) + partner * math.sin(angle))
        return torch.stack(out)

    def block(self, layer: int, sequence: Sequence, hidden: Vectors, memory: dict) -> Vectors:
        """The layer on the tokens of `hidden`. `memory` {position: [key and value of each kv head]} is read, and
        filled with the present tokens where the configuration says so."""
        config, name = self.config, f"layers.{layer}"
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
        qkv = self.weights[f"{name}.attention.qkv.weight"]
        queries, own = {}, {}
        for t, x in hidden.items():
            projected = qkv @ self.norm(f"{name}.attention_norm", x)
            parts = [projected[i * width : (i + 1) * width] for i in range(heads + 2 * kv_heads)]
            place = sequence.rotary_position[t]
            queries[t] = [self.rotated(parts[h], place) for h in range(heads)]
            keys = [self.rotated(parts[heads + g], place) for g in range(kv_heads)]
            own[t] = [(keys[g], parts[heads + kv_heads + g]) for g in range(kv_heads)]
        if config.kv_sharing == "recursion_wise":
            seen = own
        else:
            if config.kv_sharing == "hybrid" or not memory:
                memory.update(own)
            seen = memory
        out = {}
        for t, x in hidden.items():
            attended = []
            for h in range(heads):
                group = h // (heads // kv_heads)
                visible = [s for s in seen if s <= t and sequence.document[s] == sequence.document[t]]
                scores = [queries[t][h] @ seen[s][group][0] / math.sqrt(width) for s in visible]
                total = sum(score.exp() for score in scores)
                attended.append(sum(score.exp() / total * seen[s][group][1] for score, s in zip(scores, visible)))
            x = x + self.weights[f"{name}.attention.output.weight"] @ torch.cat(attended)
            both = self.weights[f"{name}.feed_forward.gate_up.weight"] @ self.norm(f"{name}.feed_forward_norm", x)
            gate, up = both[: config.intermediate_size], both[config.intermediate_size :]
            out[t] = x + self.weights[f"{name}.feed_forward.down.weight"] @ (gate / (1 + (-gate).exp()) * up)
        return out

    def shared_block(self, r: int, sequence: Sequence, hidden: Vectors, memories: dict) -> Vectors:
        for place, layer in enumerate(self.config.schedule.steps[r]):
            hidden = self.block(layer, sequence, hidden, memories.setdefault(place, {}))
        return hidden

    def score(self, name: str, x: Tensor) -> Tensor:
        inner = self.weights.get(f"{name}.inner.weight")
        if inner is not None:
            x = inner @ x
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return self.weights[f"{name}.score.weight"] @ x

    def expert_choice(self, sequence: Sequence, hidden: Vectors) -> Vectors:
        config, router = self.config, self.config.router
        planned = config.capacities
        competing, memories = list(sequence.tokens), {}
        sequence.depth = dict.fromkeys(sequence.tokens, 0)
        soft_depth = torch.zeros((), dtype=torch.float64)
        for r in range(self.fixed_depth or config.recursions):
            scores, deciding = {}, {}
            for t in competing:
                if router.network == "random":
                    share = planned[r] / (planned[r - 1] if r else 1.0)
                    drawn = uniform(sequence.ids[t], t, r) - (1.0 - share)
                    scores[t] = torch.tensor(drawn, dtype=torch.float64)
                else:
                    scores[t] = self.score(f"router.steps.{r}.network", hidden[t])[0]
                deciding[t] = scores[t]
                if router.causal == "aux_router":
                    deciding[t] = self.score(f"router.steps.{r}.auxiliary", hidden[t].detach())[0]
            unconditional = planned[r] == 1.0
            if self.fixed_depth:
                selected = list(competing)
            elif self.routing == "causal":
                selected = [t for t in competing if unconditional or deciding[t] >= 0]
            else:
                room = max(1, int(self.capacities[r] * len(sequence.tokens))) if sequence.tokens else 0
                ranked = sorted(competing, key=lambda t: -scores[t].item())
                selected = sorted(ranked[:room])
                if room < len(ranked):
                    sequence.margins.append(scores[ranked[room - 1]].item() - scores[ranked[room]].item())
                learned = self.expert_choice_losses(sequence, scores, deciding, selected, unconditional)
                soft_depth = soft_depth + learned
            f = self.shared_block(r, sequence, {t: hidden[t] for t in selected}, memories)
            for t in selected:
                gate = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda s: s}[router.gate](scores[t])
                hidden = {**hidden, t: hidden[t] + router.alpha * gate * f[t]}
                sequence.depth[t] += 1
            sequence.step_tokens.append(len(selected))
            competing = selected
        if router.target_depth is not None and self.routing == "topk" and not self.fixed_depth:
            error = (soft_depth - router.target_depth) ** 2
            sequence.losses["target_depth"] = [router.target_depth_coefficient * error]
        return hidden

    def expert_choice_losses(self, sequence, scores, deciding, selected, unconditional):
        router = self.config.router
        count = max(1, len(scores))
        soft = torch.zeros((), dtype=torch.float64)
        terms = {"causal": router.causal_coefficient, "z_loss": router.z_loss, "entropy": router.entropy}
        sums = {name: torch.zeros((), dtype=torch.float64) for name in terms}
        for t in scores:
            # log sigmoid(x) = -log(1 + exp(-x)), so that a score of 300 still has a finite one.
            sums["causal"] = sums["causal"] + (1 + (-deciding[t] if t in selected else deciding[t]).exp()).log()
            sums["z_loss"] = sums["z_loss"] + scores[t] ** 2
            for x in (scores[t], -scores[t]):
                sums["entropy"] = sums["entropy"] - torch.sigmoid(x) * (1 + (-x).exp()).log()
            soft = soft + (1.0 if unconditional else torch.sigmoid(deciding[t]))
            if not unconditional:
                sequence.agreed.append(bool(deciding[t] >= 0) == (t in selected))
        for name, coefficient in terms.items():
            if coefficient:
                sequence.losses.setdefault(name, []).append(coefficient * sums[name] / count)
        return soft / max(1, len(sequence.tokens))

    def token_choice(self, sequence: Sequence, hidden: Vectors) -> Vectors:
        _config, router, R = self.config, self.config.router, self.config.recursions
        gates, scores, share = {}, {}, {}
        for t in sequence.tokens:
            if router.network == "random":
                drawn = [uniform(sequence.ids[t], t, r) for r in range(R)]
                scores[t] = torch.tensor(drawn, dtype=torch.float64)
            else:
                scores[t] = self.score("router.network", hidden[t])
            exponentials = scores[t].exp()
            gates[t] = exponentials / exponentials.sum() if router.gate == "softmax" else 1 / (1 + 1 / exponentials)
            share[t] = gates[t] / gates[t].sum()
            preference = gates[t].tolist()
            if router.balance == "bias" and self.balance_steps is not None:
                preference = [p + router.bias_update_rate * n for p, n in zip(preference, self.balance_steps)]
            sequence.depth[t] = self.fixed_depth or max(range(R), key=lambda i: preference[i]) + 1
        if not self.fixed_depth:
            self.token_choice_losses(sequence, scores, share)
        start, memories = hidden, {}
        for r in range(self.fixed_depth or R):
            selected = [t for t in sequence.tokens if sequence.depth[t] >= r + 1]
            f = self.shared_block(r, sequence, {t: hidden[t] for t in selected}, memories)
            for t in selected:
                last = sequence.depth[t] == r + 1
                weight = router.alpha * gates[t][r] if last or router.combine == "paper" else 1.0
                hidden = {**hidden, t: weight * f[t] + (start[t] if last else 0.0)}
            sequence.step_tokens.append(len(selected))
        return hidden

    def token_choice_losses(self, sequence, scores, share):
        router, R = self.config.router, self.config.recursions
        count = max(1, len(sequence.tokens))
        zero = torch.zeros((), dtype=torch.float64)
        if router.balance == "loss" and router.balance_coefficient:
            balance = zero
            for i in range(R):
                chosen = sum(1 for t in sequence.tokens if sequence.depth[t] == i + 1)
                balance = balance + R / count * chosen * sum((share[t][i] for t in sequence.tokens), zero) / count
            sequence.losses["balance"] = [router.balance_coefficient * balance]
        if router.z_loss:
            squares = [scores[t].exp().sum().log() ** 2 for t in sequence.tokens]
            sequence.losses["z_loss"] = [router.z_loss * sum(squares, zero) / count]
        if router.entropy:
            negative = [(share[t] * share[t].log()).sum() for t in sequence.tokens]
            sequence.losses["entropy"] = [router.entropy * sum(negative, zero) / count]
        if router.target_depth is not None:
            expected = sum((share[t][i] * (i + 1) for t in sequence.tokens for i in range(R)), zero) / count
            sequence.losses["target_depth"] = [router.target_depth_coefficient * (expected - router.target_depth) ** 2]


def uniform(token_id: int, position: int, salt: int) -> float:
    """The random router's draw, as documented: lowbias32 of a linear mix, 24 bits."""
    x = (token_id * 0x2545F491 + position * 0x1B873593 + salt * 0x3C6EF372) % 2**32
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    x ^= x >> 15
    return (x >> 8) / 2**24
