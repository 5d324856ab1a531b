"""Expert-choice routing: each recursion step chooses its tokens among those that took the step before.

Paper: Bae et al. 2025 (arXiv 2507.10524), section 2.2.1 and appendix on routing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_model.config import ExpertChoiceConfig, ModelConfig
from mor_model.routing import (
    Decision,
    RoutingInputs,
    RoutingRecord,
    ScoreNetwork,
    Selection,
    binary_entropy,
    exact_dtype,
    gather_entries,
    gather_rows,
    random_uniform,
    select_top,
    select_where,
    sequence_mean,
    within,
)


class StepRouter(nn.Module):
    """Scores of one recursion step, and the scores that decide causally: the same ones, or an auxiliary router's.

    The auxiliary router sees detached hidden states, so that training it moves nothing else.
    """

    def __init__(self, router: ExpertChoiceConfig, hidden_size: int) -> None:
        super().__init__()
        learned = router.network != "random"
        self.network = ScoreNetwork(router.network, hidden_size, 1) if learned else None
        auxiliary = router.network if learned else "linear"
        self.auxiliary = ScoreNetwork(auxiliary, hidden_size, 1) if router.causal == "aux_router" else None

    def forward(self, hidden_BND: Tensor, random_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores [B, N], deciding scores [B, N]) of hidden states [B, N, D]; a random router takes its scores as
        given.
        """
        scores_BN = random_BN if self.network is None else self.network(hidden_BND).squeeze(-1)
        assert scores_BN is not None
        if self.auxiliary is None:
            return scores_BN, scores_BN
        return scores_BN, self.auxiliary(hidden_BND.detach()).squeeze(-1)


class ExpertChoice(nn.Module):
    """One router for each recursion step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.router, ExpertChoiceConfig)
        self.router = config.router
        self.planned = config.capacities
        self.steps = nn.ModuleList(StepRouter(config.router, config.hidden_size) for _ in range(config.recursions))

    def gate(self, scores: Tensor) -> Tensor:
        """Weight of a block's output from its router's score; alpha scales the gate, not the score."""
        if self.router.gate == "sigmoid":
            return self.router.alpha * torch.sigmoid(scores)
        if self.router.gate == "tanh":
            return self.router.alpha * torch.tanh(scores)
        return self.router.alpha * scores

    def takes_all(self, step: int) -> bool:
        """True for a step planned at capacity 1: in training it takes every token, so there is nothing to decide
        causally.
        """
        return self.planned[step] >= 1.0

    def random_scores(self, step: int, input_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Scores of a random router, of which the planned share is at least 0; None for a learned one."""
        if self.router.network != "random":
            return None
        share = self.planned[step] / (self.planned[step - 1] if step else 1.0)
        return random_uniform(input_ids, positions, step).double() - (1.0 - share)

    def decide(
        self, step: int, hidden_BTD: Tensor, competing: Selection, inputs: RoutingInputs, record: RoutingRecord
    ) -> Decision:
        """Choose the tokens of a recursion step and weigh them.

        Args:
            step: 0-based recursion step. hidden_BTD: state before it.
            competing: the tokens that took the step before (all of them at first).
            record: is added to.
        """
        random_BN = self.random_scores(step, inputs.input_ids_BT, inputs.position_T.expand_as(inputs.input_ids_BT))
        if random_BN is not None:
            random_BN = gather_entries(random_BN, competing.indices_BN).to(exact_dtype(hidden_BTD.dtype))
        scores_BN, deciding_BN = self.steps[step](gather_rows(hidden_BTD, competing.indices_BN), random_BN)
        by_threshold_BN = deciding_BN >= 0  # sigmoid(score) >= 0.5
        if inputs.depth is not None or (inputs.causal and self.takes_all(step)):
            chosen = Selection(None, competing.valid_BN)
        elif inputs.causal:
            valid = competing.valid_BN
            chosen = select_where(by_threshold_BN if valid is None else by_threshold_BN & valid)
        else:
            chosen = self._top(step, scores_BN.detach(), competing, inputs)
            self._learn(step, scores_BN, deciding_BN, by_threshold_BN, chosen, competing.valid_BN, inputs, record)
        weights_BN = self.gate(gather_entries(scores_BN, chosen.indices_BN))
        if chosen.valid_BN is not None:
            weights_BN = torch.where(chosen.valid_BN, weights_BN, 0.0)
        selection = within(competing, chosen)
        record.entropy.append((binary_entropy(scores_BN.detach()), competing.valid_BN))
        record.weights.append((weights_BN.detach(), chosen.valid_BN))
        if record.keep_scores:
            record.scores_BT.append(_spread(scores_BN.detach(), competing, inputs.input_ids_BT.shape[1]))
        return Decision(selection, weights_BN)

    def _top(self, step: int, scores_BN: Tensor, competing: Selection, inputs: RoutingInputs) -> Selection:
        # Capacity is a share of the sequence, never of the tokens still active: that would compound over the steps.
        capacity, tokens = inputs.capacities[step], inputs.input_ids_BT.shape[1]
        k = max(1, int(capacity * tokens))
        if capacity >= (inputs.capacities[step - 1] if step else 1.0):
            return Selection(None, competing.valid_BN)
        k_B = None
        if inputs.length_B is not None:
            k_B = (capacity * inputs.length_B.double()).long().clamp(min=1).minimum(inputs.length_B)
        return select_top(scores_BN, competing.valid_BN, k, k_B)

    def _learn(
        self,
        step: int,
        scores_BN: Tensor,
        deciding_BN: Tensor,
        by_threshold_BN: Tensor,
        chosen: Selection,
        valid_BN: Tensor | None,
        inputs: RoutingInputs,
        record: RoutingRecord,
    ) -> None:
        target_BN = _as_mask(chosen, scores_BN)
        if not self.takes_all(step):
            record.agreed.append(((by_threshold_BN == target_BN).to(scores_BN.dtype), valid_BN))
        router = self.router
        if router.causal_coefficient:
            surprise_BN = F.binary_cross_entropy_with_logits(
                deciding_BN, target_BN.to(deciding_BN.dtype), reduction="none"
            )
            record.add_loss("causal", router.causal_coefficient * sequence_mean(surprise_BN, valid_BN))
        if router.z_loss:
            record.add_loss("z_loss", router.z_loss * sequence_mean(scores_BN.square(), valid_BN))
        if router.entropy:
            record.add_loss("entropy", -router.entropy * sequence_mean(binary_entropy(scores_BN), valid_BN))
        if router.target_depth is not None:
            taken_BN = torch.ones_like(deciding_BN) if self.takes_all(step) else torch.sigmoid(deciding_BN)
            if valid_BN is not None:
                taken_BN = taken_BN.masked_fill(~valid_BN, 0.0)
            length = inputs.input_ids_BT.shape[1] if inputs.length_B is None else inputs.length_B.clamp(min=1)
            record.depth_B.append(taken_BN.sum(1) / length)

    def finish(self, record: RoutingRecord) -> None:
        """Add the losses that look at all steps together."""
        if self.router.target_depth is not None and record.depth_B:
            depth_B = torch.stack(record.depth_B).sum(0)
            error = (depth_B - self.router.target_depth).square().mean()
            record.add_loss("target_depth", self.router.target_depth_coefficient * error)


def _as_mask(chosen: Selection, like_BN: Tensor) -> Tensor:
    if chosen.indices_BN is None:
        return torch.ones_like(like_BN, dtype=torch.bool) if chosen.valid_BN is None else chosen.valid_BN
    taken = torch.ones_like(chosen.indices_BN, dtype=torch.bool) if chosen.valid_BN is None else chosen.valid_BN
    return torch.zeros_like(like_BN, dtype=torch.bool).scatter(1, chosen.indices_BN, taken)


def _spread(scores_BN: Tensor, competing: Selection, tokens: int) -> Tensor:
    scores = scores_BN if competing.valid_BN is None else scores_BN.masked_fill(~competing.valid_BN, torch.nan)
    if competing.indices_BN is None:
        return scores
    return scores.new_full((scores.shape[0], tokens), torch.nan).scatter(1, competing.indices_BN, scores)
