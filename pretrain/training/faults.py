"""What a run does about a step that went wrong: a loss or a gradient that is not finite, or a loss spike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.checkpoints.store import CheckpointStore, TrainState
from pretrain.errors import RunError
from pretrain.recipe.plan import Plan
from pretrain.recipe.recipe import Recipe
from pretrain.records.telemetry import Telemetry
from pretrain.training.batches import StepBatch, merge_ranges


@dataclass(kw_only=True)
class FaultRules:
    """The recipe's `faults`, applied to one step after another.

    Attributes:
        finish_checkpoint: waits until the checkpoint that is being written is complete.
        returns: the checkpoint that the run last went back to for a loss spike, and how often in a row.
    """

    recipe: Recipe
    plan: Plan
    store: CheckpointStore
    telemetry: Telemetry
    finish_checkpoint: Callable[[TrainState], None]
    returns: tuple[int, int] = (0, 0)

    def find_spike(self, state: TrainState, loss: torch.Tensor) -> float | None:
        """The step's mean loss over the ranks if it is a spike, else None. Collective."""
        faults = self.recipe.faults
        total = loss.clone()
        dist.all_reduce(total)
        mean = float(total) / dist.get_world_size()
        usual = state.recent_losses
        if faults.spike is None or len(usual) < faults.spike_window:
            return None
        # A non-finite loss is not a spike; `judge` handles it.
        return mean if mean - sum(usual) / len(usual) > faults.spike else None

    def handle_spike(self, state: TrainState, batch: StepBatch, loss: float) -> bool:
        """Tell of a loss spike, whose update was left out; True when the run went back to its last checkpoint."""
        samples = (batch.samples[0], batch.samples[-1])
        action = self.recipe.faults.on_spike
        self.telemetry.event("spike", state.step, loss=loss, samples=samples, action=action)
        if action != "rollback":
            self.telemetry.say(f"Step {state.step}: loss {loss:.3f} is a spike; its update is left out.")
            return False
        self.finish_checkpoint(state)
        selected = self.store.newest()
        if selected is None:
            self.telemetry.say(
                f"Step {state.step}: loss {loss:.3f} is a spike, and there is no checkpoint to go back to; its update "
                "is left out."
            )
            return False
        spiked = state.step
        back = self.store.load(selected)
        self.returns = (back.step, self.returns[1] + 1 if self.returns[0] == back.step else 1)
        if self.returns[1] > self.recipe.faults.max_non_finite:
            raise RunError(
                f"The run has gone back to step {back.step} {self.returns[1] - 1} times and met a loss spike on other "
                f"samples each time, the last at step {spiked} with loss {loss:.3f}. Either raise faults.spike if that "
                "loss is no fault, and start again, or lower optim.lr in a new run_dir."
            )
        # What led to the spike is left out the second time, so the run meets other data.
        gap = (back.position, batch.next_position - 1)
        for name, value in vars(back).items():
            setattr(state, name, value)
        state.skipped = merge_ranges(state.skipped, (gap,))
        self.telemetry.rewind(state.step)
        self.telemetry.event("rollback", state.step, from_step=spiked, samples=gap)
        self.telemetry.say(
            f"Step {spiked}: loss {loss:.3f} is a spike; back to step {state.step} without samples {gap}."
        )
        return True

    def judge(
        self, state: TrainState, batch: StepBatch, scalars: dict[str, float], applied: bool, spike: float | None
    ) -> None:
        """Count updates left out in a row, for a loss or gradient that is not finite or for a spike, and give up after
        too many, or where the last loss of all is not finite: a run that diverged does not finish.
        """
        loss = scalars["loss"]
        finite = loss - loss == 0.0
        samples = [batch.samples[0], batch.samples[-1]]
        if applied and finite:
            state.non_finite_in_row = 0
            window = self.recipe.faults.spike_window if self.recipe.faults.spike is not None else 0
            state.recent_losses = (*state.recent_losses, scalars["lm_loss"])[-window:] if window else ()
            return
        if spike is None and finite and self.recipe.precision == "fp16":
            # The loss scale was too high and is halved: how fp16 works, not a fault.
            self.telemetry.event("loss_scale_lowered", state.step)
            return
        state.non_finite_in_row += 1
        if spike is None:
            self.telemetry.event("non_finite", state.step, samples=samples, in_row=state.non_finite_in_row)
            self.telemetry.say(
                f"Step {state.step}: loss or gradient is not finite; its update is left out (samples {samples})."
            )
        if state.step == self.plan.steps and not finite:
            fault = "The loss that the run ends with is not finite,"
        elif state.non_finite_in_row < self.recipe.faults.max_non_finite:
            return
        elif spike is None:
            fault = f"{state.non_finite_in_row} steps in a row had a non-finite loss or gradient, the last"
        else:
            fault = f"{state.non_finite_in_row} steps in a row were left out, the last for a loss spike"
        advice = "" if spike is None else "(or raise faults.spike if that loss is no fault) "
        raise RunError(
            f"{fault} at step {state.step} (samples {samples[0]} to {samples[1]}). Leave the samples out with "
            f"data.skip_samples {advice}and start again, or lower optim.lr in a new run_dir."
        )
