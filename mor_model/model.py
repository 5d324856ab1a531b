"""The network: embedding, prelude layers, recursion steps, coda layers, head."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mor_model.activation_checkpointing import ActivationCheckpointing, check_policy
from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from mor_model.errors import ConfigError
from mor_model.expert_choice import ExpertChoice
from mor_model.initialization import Gathered, initialize, whole
from mor_model.layers import Block, RMSNorm
from mor_model.loss import IGNORED_LABEL, Head
from mor_model.outputs import ModelOutput
from mor_model.recursion import LayerRunner, Sequences, recurse
from mor_model.routing import Decision, RoutingInputs, RoutingRecord
from mor_model.routing_statistics import routing_statistics, routing_value
from mor_model.token_choice import TokenChoice


class RecursiveTransformer(nn.Module):
    """A decoder-only language model whose stored layers are applied along a `LayerSchedule`.

    Vanilla, recursive and Mixture-of-Recursions models are this class with different configurations. A stored layer is
    one module however often it is applied, so tied layers cannot drift apart.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: ActivationCheckpointing = "none") -> None:
        """Args:
        config: what to build.
        activation_checkpointing: what the backward pass computes again, see `mor_model.activation_checkpointing`.

        Raises:
            ConfigError: for an unknown checkpointing policy.
        """
        super().__init__()
        check_policy(activation_checkpointing)
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.schedule.num_stored))
        self.router = _router(config)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size, self.embedding if config.tie_embeddings else None)

    def initialize(self, seed: int, gathered: Gathered = whole) -> None:
        """Deterministic weights, see `mor_model.initialization.initialize`."""
        initialize(self, self.config, seed, gathered)

    def forward(
        self,
        input_ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        documents_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        routing: Literal["topk", "causal"] = "topk",
        depth: int | None = None,
        capacities: tuple[float, ...] | None = None,
        loss_normalizer: Tensor | float | None = None,
        return_logits: bool = False,
        return_losses: bool = False,
        return_routing: bool = False,
    ) -> ModelOutput:
        """Run the network.

        Args:
            input_ids_BT: token ids. labels_BT: the id that follows each of them, -100 where nothing is to be predicted.
            documents_BT: number of each token's document, different for neighbours; wanted exactly when the
                configuration has document_masking.
            valid_BT: True on real tokens, False on padding; None when all are real.
            routing: `topk` as in training, which looks at the whole sequence; `causal` decides without looking ahead.
                Token-choice is causal either way.
            depth: recursion steps that every token takes; None lets the router decide.
            capacities: replaces the configured share of the sequence of each step under `topk` (warm-up, curriculum).
            loss_normalizer: what the sum of NLL is divided by; None is the number of labels in this batch. With micro-
                batches, pass their mean number of labels, and mean gradients are those of the whole batch.
            return_logits, return_losses, return_routing: fill the fields of that name.

        Raises:
            ConfigError: when the arguments do not fit the configuration.
        """
        self._check(routing, depth, capacities, documents_BT)
        config, schedule = self.config, self.config.schedule
        hidden_BTD = self.embedding(input_ids_BT)
        sequences = Sequences.of(config, hidden_BTD, documents_BT, valid_BT)
        inputs = RoutingInputs(
            input_ids_BT=input_ids_BT,
            position_T=torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device),
            valid_BT=valid_BT,
            length_B=None if valid_BT is None else valid_BT.sum(1),
            causal=routing == "causal",
            depth=depth,
            capacities=config.capacities if capacities is None else tuple(capacities),
        )
        record = RoutingRecord(keep_scores=return_routing)
        runner = LayerRunner(config, self.activation_checkpointing)
        hidden_BTD = self._run(runner, schedule.prelude, hidden_BTD, sequences)
        steps = [[self.layers[index] for index in step] for step in schedule.steps]
        hidden_BTD, decisions = recurse(runner, steps, self.router, hidden_BTD, sequences, inputs, record)
        hidden_BTD = self.final_norm(self._run(runner, schedule.coda, hidden_BTD, sequences))
        return self._output(
            hidden_BTD, labels_BT, loss_normalizer, decisions, inputs, record, return_logits, return_losses
        )

    def update_balance(self, counts_R: Tensor) -> None:
        """Token-choice with `balance: bias`: move the bias once per optimiser step.

        Args:
            counts_R: `stats["counts_R"]` summed over micro-batches and processes.
        """
        assert isinstance(self.router, TokenChoice)
        self.router.update_balance(counts_R)

    def _run(self, runner: LayerRunner, schedule: tuple[int, ...], hidden_BTD: Tensor, sequences: Sequences) -> Tensor:
        layers = [self.layers[index] for index in schedule]
        return runner.layers(layers, hidden_BTD, sequences.rotary, sequences.visibility)[0]

    def _output(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor | None,
        loss_normalizer: Tensor | float | None,
        decisions: list[Decision],
        inputs: RoutingInputs,
        record: RoutingRecord,
        return_logits: bool,
        return_losses: bool,
    ) -> ModelOutput:
        losses = {name: torch.stack(values).sum() for name, values in record.losses.items()}
        aux = {name: value.detach() for name, value in losses.items()}
        stats = routing_statistics(decisions, inputs, record, self.config)
        routing = routing_value(decisions, inputs, record) if record.keep_scores else None
        logits = self.head(hidden_BTD) if labels_BT is None or return_logits else None
        if labels_BT is None:
            return ModelOutput(None, None, None, logits, aux, stats, routing)
        total, losses_BT = self.head(hidden_BTD, labels_BT)
        count = (labels_BT != IGNORED_LABEL).sum().clamp(min=1)
        loss = total / (count if loss_normalizer is None else loss_normalizer)
        for value in losses.values():
            loss = loss + value
        return ModelOutput(
            loss, total.detach() / count, losses_BT if return_losses else None, logits, aux, stats, routing
        )

    def _check(
        self,
        routing: str,
        depth: int | None,
        capacities: tuple[float, ...] | None,
        documents_BT: Tensor | None,
    ) -> None:
        config = self.config
        if routing not in ("topk", "causal"):
            raise ConfigError(f"routing: {routing!r} is not 'topk' or 'causal'.")
        if depth is not None and not 1 <= depth <= config.recursions:
            raise ConfigError(f"depth: {depth} is not between 1 and the model's {config.recursions} recursions.")
        if config.document_masking != (documents_BT is not None):
            raise ConfigError(
                "model.document_masking: the forward pass needs documents_BT (a document number for every token)."
                if config.document_masking
                else "documents_BT: the model was built without document_masking, so pass none, or build it with."
            )
        if capacities is not None:
            if not isinstance(config.router, ExpertChoiceConfig):
                raise ConfigError("capacities: only an expert-choice router has any; pass none.")
            if len(capacities) != config.recursions:
                raise ConfigError(f"capacities: {len(capacities)} values for {config.recursions} recursions.")
            replace(config.router, capacities=capacities)  # refuses what no router could have
            if config.kv_sharing != "recursion_wise" and capacities[0] < 1.0:
                raise ConfigError(
                    f"capacities: the first step must take every token with kv_sharing {config.kv_sharing!r}."
                )


def _router(config: ModelConfig) -> ExpertChoice | TokenChoice | None:
    if isinstance(config.router, ExpertChoiceConfig):
        return ExpertChoice(config)
    return TokenChoice(config) if isinstance(config.router, TokenChoiceConfig) else None
