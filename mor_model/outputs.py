"""What a forward pass returns: the loss, what it is made of, and the routing decisions as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class RoutingStep:
    """One recursion step's decision; everything detached.

    Attributes:
        selected_BN: places in the sequence of the tokens that took the step, ascending where valid.
        valid_BN: False where a sequence selected fewer than N tokens and the entry means nothing.
        scores_BT: the router's score of every token that competed, NaN elsewhere; None without a router. Token-choice
            gives the score of this step's depth.
        weights_BN: the gate's weight of each selected token (0 where not valid); None without a router.
    """

    selected_BN: Tensor
    valid_BN: Tensor
    scores_BT: Tensor | None
    weights_BN: Tensor | None


@dataclass(frozen=True)
class Routing:
    """Which tokens took which recursion steps: depth_BT counts each token's steps (0 for padding), `steps` has one
    entry per step run."""

    depth_BT: Tensor
    steps: tuple[RoutingStep, ...]


class ModelOutput(NamedTuple):
    """Result of `RecursiveTransformer.forward`.

    Attributes:
        loss: what to differentiate: the language-model loss (sum of NLL / loss_normalizer, by default the number of
            labels) plus the weighted auxiliary losses. None without labels.
        lm_loss: mean negative log-likelihood per label in nats, fp32, detached.
        losses_BT: per-token NLL, fp32, detached, 0 where the label is ignored; None unless asked for.
        logits_BTV: None unless asked for, or when there are no labels.
        aux: weighted auxiliary losses by name, detached scalars.
        stats: small detached tensors: `active_R` (share of the real tokens that took each step) and what the router
            has to say.
        routing: the decisions; None unless asked for.
    """

    loss: Tensor | None
    lm_loss: Tensor | None
    losses_BT: Tensor | None
    logits_BTV: Tensor | None
    aux: dict[str, Tensor]
    stats: dict[str, Tensor]
    routing: Routing | None
