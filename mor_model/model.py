"""The network: embedding, prelude layers, recursion steps, coda layers, head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mor_model.attention import visibility_among
from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.initialization import Gathered, _ungathered, initialize
from mor_model.layers import Block, RMSNorm, rotary
from mor_model.loss import IGNORED_LABEL, Head
from mor_model.outputs import ModelOutput


class RecursiveTransformer(nn.Module):
    """A decoder-only language model whose stored layers are applied along a `LayerSchedule`.

    Vanilla, recursive and Mixture-of-Recursions models are this class with different configurations.
    """

    def __init__(self, config: ModelConfig, checkpointing: str = "none") -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.schedule.num_stored))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size, self.embedding if config.tie_embeddings else None)

    def initialize(self, seed: int, gathered: Gathered = _ungathered) -> None:
        """Deterministic weights, see `mor_model.initialization`."""
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
        if self.config.router is not None:
            raise ConfigError("model.router: routing arrives with the next commit.")
        table = rotary(
            torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device),
            self.config.head_width,
            self.config.rope_theta,
        )
        visibility = visibility_among(documents_BT)
        hidden_BTD = self.embedding(input_ids_BT)
        for index in self.config.schedule.applications:
            hidden_BTD = self.layers[index](hidden_BTD, table, visibility).hidden_BND
        hidden_BTD = self.final_norm(hidden_BTD)
        logits = self.head(hidden_BTD) if labels_BT is None or return_logits else None
        active = torch.ones(self.config.recursions, device=hidden_BTD.device)
        if labels_BT is None:
            return ModelOutput(None, None, None, logits, {}, {"active_R": active}, None)
        total, losses_BT = self.head(hidden_BTD, labels_BT)
        count = (labels_BT != IGNORED_LABEL).sum().clamp(min=1)
        loss = total / (count if loss_normalizer is None else loss_normalizer)
        return ModelOutput(
            loss, total.detach() / count, losses_BT if return_losses else None, logits, {}, {"active_R": active}, None
        )
