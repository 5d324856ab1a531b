"""The recursion step: select tokens, run the shared layers on them, write them back. And the loop over the steps.

Expert-choice: H'[selected] = H[selected] + g * f(H[selected]); the others keep their state.
Token-choice (paper): H_r = g_r f(H_(r-1)), and + H_1 (the recursion input) at the token's last step.
Without a router: H' = f(H). f is the whole shared block, its own residual connections included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mor_model.activation_checkpointing import ActivationCheckpointing, layer_runner, step_runner
from mor_model.attention import Visibility, visibility_among, visibility_between
from mor_model.config import ModelConfig
from mor_model.expert_choice import ExpertChoice
from mor_model.layers import AttentionOutput, Memory, Rotary, rotary
from mor_model.routing import (
    Decision,
    RoutingInputs,
    RoutingRecord,
    Selection,
    exact_dtype,
    flat_rows,
    gather_entries,
    gather_rows,
)
from mor_model.token_choice import TokenChoice


@dataclass(frozen=True)
class Sequences:
    """Where tokens stand and which belong together, the same for every layer.

    Attributes:
        position: rotary positions, [T], or [B, T] where documents restart them.
        group_BT: document of each token and -1 for padding; None when a sequence is one whole.
        rotary, visibility: of all T tokens.
    """

    position: Tensor
    group_BT: Tensor | None
    rotary: Rotary
    visibility: Visibility

    @classmethod
    def of(
        cls, config: ModelConfig, hidden_BTD: Tensor, documents_BT: Tensor | None, valid_BT: Tensor | None
    ) -> Sequences:
        place_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        position = place_T
        if config.reset_positions and documents_BT is not None:
            position = place_T - _document_starts(documents_BT, place_T)
        group_BT = documents_BT
        if valid_BT is not None:
            group_BT = valid_BT.long() - 1 if documents_BT is None else documents_BT.where(valid_BT, -1)
        table = rotary(position, config.head_width, config.rope_theta, exact_dtype(hidden_BTD.dtype))
        return cls(position, group_BT, table, visibility_among(group_BT))


def _document_starts(documents_BT: Tensor, place_T: Tensor) -> Tensor:
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return (place_T * starts_BT).cummax(dim=1).values


class LayerRunner:
    """Calls layers under a checkpointing policy."""

    def __init__(self, config: ModelConfig, policy: ActivationCheckpointing) -> None:
        self.head_width, self.theta = config.head_width, config.rope_theta
        self.shares_memory = config.kv_sharing != "recursion_wise"
        self.refreshes_memory = config.kv_sharing == "hybrid"
        self.run_step, self.run_layer = step_runner(policy), layer_runner(policy)

    def layers(
        self,
        layers: Sequence[nn.Module],
        x_BND: Tensor,
        table: Rotary,
        visibility: Visibility,
        memories: Sequence[Memory] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(hidden states, keys and values each layer attended to) after all layers."""
        attended = []
        for place, layer in enumerate(layers):
            memory = None if memories is None else memories[place]
            out: AttentionOutput = self.run_layer(layer, x_BND, table, visibility, memory)
            x_BND = out.hidden_BND
            attended.append((out.key_BSGK, out.value_BSGK))
        return x_BND, attended

    def step(
        self,
        layers: Sequence[nn.Module],
        hidden_BTD: Tensor,
        decision: Decision,
        sequences: Sequences,
        origin_BTD: Tensor | None,
        remembered: list[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]] | None]:
        """One recursion step.

        Args:
            layers: the shared block. hidden_BTD: state of all tokens.
            decision: who takes the step, and with what weight.
            origin_BTD: the recursion input, for token-choice.
            remembered: rotated keys and values [B, T, G, K] of each layer from the steps before; None at the first step
                and where every step keeps its own.

        Returns:
            The state after the step, and what later steps remember (None where every step keeps its own).
        """
        indices_BN, valid_BN = decision.selection
        x_BND = gather_rows(hidden_BTD, indices_BN)
        table, visibility = self._surroundings(decision.selection, sequences, remembered is not None)
        memories = None
        if remembered is not None:
            all_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).expand(hidden_BTD.shape[:2])
            slots_BN = (all_BT if indices_BN is None else indices_BN) if self.refreshes_memory else None
            memories = [Memory(key, value, slots_BN, valid_BN) for key, value in remembered]
        f_BND, attended = self.layers(layers, x_BND, table, visibility, memories)
        if decision.weights_BN is not None:
            residual_BND = x_BND
            if decision.last_BN is not None:
                assert origin_BTD is not None
                residual_BND = gather_rows(origin_BTD, indices_BN) * decision.last_BN[..., None]
                if valid_BN is not None:
                    residual_BND = torch.where(valid_BN[..., None], residual_BND, x_BND)
            f_BND = (residual_BND + decision.weights_BN[..., None] * f_BND).to(hidden_BTD.dtype)
        if indices_BN is not None:
            rows = flat_rows(indices_BN, hidden_BTD.shape[1])
            f_BND = hidden_BTD.flatten(0, 1).index_copy(0, rows, f_BND.flatten(0, 1)).view_as(hidden_BTD)
        if not self.shares_memory:
            return f_BND, None
        if remembered is None:
            # Views into a layer's whole projection would keep its queries alive as long as the memory.
            attended = [(key.contiguous(), value.contiguous()) for key, value in attended]
        return f_BND, attended

    def _surroundings(
        self, selection: Selection, sequences: Sequences, reads_memory: bool
    ) -> tuple[Rotary, Visibility]:
        indices_BN, _ = selection
        if indices_BN is None:
            return sequences.rotary, sequences.visibility
        position = sequences.position
        position_BN = indices_BN if position.ndim == 1 else position.gather(1, indices_BN)
        table = rotary(position_BN, self.head_width, self.theta, sequences.rotary.cos.dtype)
        group_BN = None if sequences.group_BT is None else gather_entries(sequences.group_BT, indices_BN)
        if not reads_memory:
            return table, visibility_among(group_BN)
        place_BT = torch.arange(position.shape[-1], device=position.device).expand(indices_BN.shape[0], -1)
        return table, visibility_between(indices_BN, place_BT, group_BN, sequences.group_BT)


def recurse(
    runner: LayerRunner,
    steps: Sequence[Sequence[nn.Module]],
    router: ExpertChoice | TokenChoice | None,
    hidden_BTD: Tensor,
    sequences: Sequences,
    inputs: RoutingInputs,
    record: RoutingRecord,
) -> tuple[Tensor, list[Decision]]:
    """All recursion steps, or the first `inputs.depth`: (state after them, one decision for each step run)."""
    origin_BTD = hidden_BTD if isinstance(router, TokenChoice) else None
    if isinstance(router, TokenChoice):
        depth_BT, weights_BTR = router.plan(hidden_BTD, inputs, record)
    competing = Selection(None, inputs.valid_BT)
    decisions: list[Decision] = []
    remembered = None
    for step, layers in enumerate(steps[: inputs.depth]):
        if isinstance(router, ExpertChoice):
            decision = router.decide(step, hidden_BTD, competing, inputs, record)
        elif isinstance(router, TokenChoice):
            decision = router.decide(step, depth_BT, weights_BTR, inputs, record)
        else:
            decision = Decision(competing)
        hidden_BTD, remembered = runner.run_step(
            runner.step, layers, hidden_BTD, decision, sequences, origin_BTD, remembered
        )
        decisions.append(decision)
        competing = decision.selection
    if isinstance(router, ExpertChoice):
        router.finish(record)
    return hidden_BTD, decisions
