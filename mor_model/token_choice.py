"""Token-choice routing: every token picks its depth once, before the first recursion step.

Paper: Bae et al. 2025 (arXiv 2507.10524), section 2.2.1; balance loss: Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6;
loss-free bias: Wang et al. 2024 (arXiv 2408.15664), algorithm 1; z-loss: Zoph et al. 2022 (arXiv 2202.08906), eq. 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_model.config import ModelConfig, TokenChoiceConfig
from mor_model.routing import (
    Decision,
    RoutingInputs,
    RoutingRecord,
    ScoreNetwork,
    Selection,
    exact_dtype,
    random_uniform,
    select_where,
    sequence_mean,
)


class TokenChoice(nn.Module):
    """One router with a score for every depth."""

    balance_steps_R: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.router, TokenChoiceConfig)
        self.router = config.router
        self.recursions = config.recursions
        learned = config.router.network != "random"
        self.network = ScoreNetwork(config.router.network, config.hidden_size, self.recursions) if learned else None
        # Whole numbers of updates, because a bias held in the model's precision would lose steps of 0.001 in bf16.
        self.register_buffer("balance_steps_R", torch.zeros(self.recursions, dtype=torch.int64))

    def update_balance(self, counts_R: Tensor) -> None:
        """Move the loss-free bias towards depths chosen less often than the mean.

        Args:
            counts_R: tokens that chose each depth in the whole optimiser step (all micro-batches and processes).
        """
        counts_R = counts_R.double()
        self.balance_steps_R += torch.sign(counts_R.mean() - counts_R).long()

    def scores(self, hidden_BTD: Tensor, input_ids_BT: Tensor, position_T: Tensor) -> Tensor:
        """Scores [B, T, R] of the recursion input; entry i belongs to depth i + 1."""
        if self.network is not None:
            return self.network(hidden_BTD)
        position_BT = position_T.expand_as(input_ids_BT)
        drawn = [random_uniform(input_ids_BT, position_BT, r) for r in range(self.recursions)]
        return torch.stack(drawn, dim=-1).to(exact_dtype(hidden_BTD.dtype))

    def gate(self, scores_BTR: Tensor) -> Tensor:
        """The router's value of every depth, before alpha."""
        return scores_BTR.softmax(-1) if self.router.gate == "softmax" else torch.sigmoid(scores_BTR)

    def choose(self, gates_BTR: Tensor) -> Tensor:
        """Depth [B, T] (1..R) of every token; the loss-free bias moves the choice, never a weight."""
        if self.router.balance == "bias":
            gates_BTR = gates_BTR + self.router.bias_update_rate * self.balance_steps_R
        return gates_BTR.argmax(-1) + 1

    def plan(self, hidden_BTD: Tensor, inputs: RoutingInputs, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        """(depth [B, T], weight of each depth [B, T, R]) of every token; depth is 0 on padding."""
        scores_BTR = self.scores(hidden_BTD, inputs.input_ids_BT, inputs.position_T)
        gates_BTR = self.gate(scores_BTR)
        valid = inputs.valid_BT
        if inputs.depth is None:
            depth_BT = self.choose(gates_BTR.detach())
            self._learn(scores_BTR, gates_BTR, depth_BT, inputs, record)
        else:
            depth_BT = torch.full_like(inputs.input_ids_BT, inputs.depth)
        if record.keep_scores:
            shown = scores_BTR if valid is None else scores_BTR.masked_fill(~valid[..., None], torch.nan)
            record.scores_BT.extend(shown.detach().unbind(-1))
        return depth_BT if valid is None else depth_BT.masked_fill(~valid, 0), self.router.alpha * gates_BTR

    def decide(
        self,
        step: int,
        depth_BT: Tensor,
        weights_BTR: Tensor,
        inputs: RoutingInputs,
        record: RoutingRecord,
    ) -> Decision:
        """The tokens whose depth is greater than the 0-based `step`."""
        everyone = step == 0 or inputs.depth is not None
        selection = Selection(None, inputs.valid_BT) if everyone else select_where(depth_BT > step)
        weights_BN, depth_BN = weights_BTR[..., step], depth_BT
        if selection.indices_BN is not None:
            weights_BN, depth_BN = (x.gather(1, selection.indices_BN) for x in (weights_BN, depth_BN))
        last_BN = depth_BN == step + 1
        if self.router.combine == "code":
            weights_BN = torch.where(last_BN, weights_BN, 1.0)
        if selection.valid_BN is not None:
            weights_BN = torch.where(selection.valid_BN, weights_BN, 0.0)
        record.weights.append((weights_BN.detach(), selection.valid_BN))
        return Decision(selection, weights_BN, last_BN)

    def _learn(
        self, scores_BTR: Tensor, gates_BTR: Tensor, depth_BT: Tensor, inputs: RoutingInputs, record: RoutingRecord
    ) -> None:
        router, valid = self.router, inputs.valid_BT
        share_BTR = gates_BTR if router.gate == "softmax" else gates_BTR / gates_BTR.sum(-1, keepdim=True)
        chosen_BTR = F.one_hot(depth_BT - 1, self.recursions).to(gates_BTR.dtype)
        counted_BT = torch.ones_like(gates_BTR[..., 0]) if valid is None else valid.to(gates_BTR.dtype)
        length_B1 = counted_BT.sum(1, keepdim=True).clamp(min=1)
        counts_BR = (chosen_BTR * counted_BT[..., None]).sum(1)
        share_BR = (share_BTR * counted_BT[..., None]).sum(1) / length_B1
        record.counts_R = counts_BR.sum(0)
        entropy_BT = -(share_BTR * share_BTR.clamp(min=torch.finfo(share_BTR.dtype).tiny).log()).sum(-1)
        record.entropy.append((entropy_BT.detach(), valid))
        if router.balance == "loss" and router.balance_coefficient:
            balance_B = (self.recursions * counts_BR / length_B1 * share_BR).sum(1)
            record.add_loss("balance", router.balance_coefficient * balance_B.mean())
        if router.z_loss:
            z_BT = scores_BTR.logsumexp(-1).square()
            record.add_loss("z_loss", router.z_loss * sequence_mean(z_BT, valid))
        if router.entropy:
            record.add_loss("entropy", -router.entropy * sequence_mean(entropy_BT, valid))
        if router.target_depth is not None:
            steps_R = torch.arange(1, self.recursions + 1, device=share_BR.device)
            error_B = ((share_BR * steps_R).sum(1) - router.target_depth).square()
            record.add_loss("target_depth", router.target_depth_coefficient * error_B.mean())
