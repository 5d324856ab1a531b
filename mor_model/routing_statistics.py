"""Statistics of a forward pass's routing, always, and its decisions as a value, on request."""

from __future__ import annotations

import torch
from torch import Tensor

from mor_model.config import ModelConfig
from mor_model.outputs import Routing, RoutingStep
from mor_model.routing import Decision, RoutingInputs, RoutingRecord, Selection


def routing_statistics(
    decisions: list[Decision], inputs: RoutingInputs, record: RoutingRecord, config: ModelConfig
) -> dict[str, Tensor]:
    """Detached statistics of one forward pass.

    Returns:
        active_R: share of the real tokens that took each recursion step.
        sampling_accuracy: share of competing tokens on which the threshold agrees with top-k, over the steps that
            leave tokens out.
        dead_share: share of positions that no sequence of this batch chose at the last recursion step.
        router_entropy: mean entropy in nats of the decision (of sigmoid(score), or over the depths).
        gate_mean, gate_std: of the weights of selected tokens, over all steps.
        counts_R, balance: tokens that chose each depth, and MaxVio, max count / mean count - 1 (token-choice).
    """
    tokens = inputs.input_ids_BT.numel() if inputs.length_B is None else inputs.length_B.sum().clamp(min=1)
    device = inputs.input_ids_BT.device
    active = [_count(decision.selection, inputs.input_ids_BT) / tokens for decision in decisions]
    active += [torch.zeros((), device=device)] * (config.recursions - len(active))
    stats = {"active_R": torch.stack([share.float() for share in active])}
    if config.router is None:
        return stats
    if record.agreed:
        stats["sampling_accuracy"] = _mean(record.agreed)
    if record.entropy:
        stats["router_entropy"] = _mean(record.entropy)
    mean = _mean(record.weights)
    stats["gate_mean"] = mean
    stats["gate_std"] = _mean([((weights - mean).square(), valid) for weights, valid in record.weights]).sqrt()
    if len(decisions) == config.recursions:
        chosen_T = _taken(decisions[-1].selection, inputs.input_ids_BT).any(0)
        stats["dead_share"] = 1.0 - chosen_T.float().mean()
    if record.counts_R is not None:
        stats["counts_R"] = record.counts_R
        stats["balance"] = record.counts_R.max() / record.counts_R.mean() - 1.0
    return stats


def routing_value(decisions: list[Decision], inputs: RoutingInputs, record: RoutingRecord) -> Routing:
    """The decisions of one forward pass as a detached value."""
    ids_BT = inputs.input_ids_BT
    steps = []
    depth_BT = torch.zeros_like(ids_BT)
    for place, (selection, weights_BN, _) in enumerate(decisions):
        indices_BN, valid_BN = selection
        if indices_BN is None:
            indices_BN = inputs.position_T.expand_as(ids_BT)
        if valid_BN is None:
            valid_BN = torch.ones_like(indices_BN, dtype=torch.bool)
        scores_BT = record.scores_BT[place] if record.scores_BT else None
        steps.append(RoutingStep(indices_BN, valid_BN, scores_BT, None if weights_BN is None else weights_BN.detach()))
        depth_BT = depth_BT + _taken(selection, ids_BT)
    return Routing(depth_BT, tuple(steps))


def _count(selection: Selection, ids_BT: Tensor) -> Tensor:
    if selection.valid_BN is not None:
        return selection.valid_BN.sum()
    places = ids_BT if selection.indices_BN is None else selection.indices_BN
    return torch.full((), places.numel(), device=ids_BT.device)


def _taken(selection: Selection, ids_BT: Tensor) -> Tensor:
    """[B, T], True for tokens that took the step."""
    indices_BN, valid_BN = selection
    if indices_BN is None:
        return torch.ones_like(ids_BT, dtype=torch.bool) if valid_BN is None else valid_BN
    taken_BN = torch.ones_like(indices_BN, dtype=torch.bool) if valid_BN is None else valid_BN
    return torch.zeros_like(ids_BT, dtype=torch.bool).scatter(1, indices_BN, taken_BN)


def _mean(values: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    total, count = torch.zeros((), device=values[0][0].device), torch.zeros((), device=values[0][0].device)
    for value, valid in values:
        total = total + (value if valid is None else torch.where(valid, value, 0.0)).sum()
        count = count + (value.numel() if valid is None else valid.sum())
    return (total / count.clamp(min=1)).detach()
