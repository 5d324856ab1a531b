"""THE training loop.

One step: read the batch that the position names, run its micro-batches, update, add up over the ranks what happened,
write it down, and look whether it is time to validate, to write a checkpoint or to stop. Everything that a resumed run
needs is in `TrainState` and DeepSpeed's own state; everything else is a function of the step number.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mor_model.config import ModelConfig
from mor_model.flops import flops_per_sequence
from pretrain.checkpoints.store import CheckpointStore, TrainState
from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import Asked, Request, StopRequest
from pretrain.ranks.watchdog import Watchdog
from pretrain.recipe.plan import Plan, is_due
from pretrain.recipe.recipe import Recipe
from pretrain.records.profiling import StepProfiler
from pretrain.records.stopwatch import Stopwatch, memory_bytes, peak_memory_bytes
from pretrain.records.telemetry import Telemetry
from pretrain.training.batches import BatchReader, SampleSource, StepBatch
from pretrain.training.engine import seed_step
from pretrain.training.evaluate_in_training import EvaluationHooks
from pretrain.training.faults import FaultRules


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished` or `stopped` (with the request that stopped it)."""

    state: str
    request: Request = Request.NONE


@dataclass(frozen=True)
class StepReport:
    """One step, added up over all ranks.

    Attributes:
        scalars, vectors: means over all micro-batches by name (`active_R`: share of tokens per recursion step).
        memory, peaks: bytes in use on every rank, and the most so far; 0 on steps that are not recorded.
        written: every rank's checkpoint files are; overdue: the last checkpoint lies too many minutes back.
    """

    scalars: dict[str, float]
    vectors: dict[str, list[float]]
    memory: list[int]
    peaks: list[int]
    asked: Asked
    written: bool
    overdue: bool


@dataclass
class Interval:
    """What has been done since the last training record; time for evaluation and checkpoints is left out.

    Attributes:
        flops: what the model needs; hardware_flops: also what activation checkpointing computes again.
        paused: seconds of evaluation and checkpoints that were left out.
    """

    since: float
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    hardware_flops: float = 0.0
    paused: float = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that no step took."""
        self.since += seconds
        self.paused += seconds

    def add(self, tokens: int, flops: float, hardware_flops: float) -> None:
        """Count one step."""
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.hardware_flops += hardware_flops


@dataclass(kw_only=True)
class Trainer:
    """Everything a step touches, and the loop over the steps.

    Attributes:
        peak_rates: learning rate of each parameter group at its peak.
        peak_flops: what one rank's device promises per second; None where that is unknown.
        grad_norm: of the last step, before clipping.
        patience: seconds that a checkpoint may take before the watchdog takes it for a stall.
        failed: step of the first checkpoint that could not be written since the last one that was.
    """

    recipe: Recipe
    config: ModelConfig
    plan: Plan
    ranks: Ranks
    device: torch.device
    engine: Any
    peak_rates: list[float]
    reader: BatchReader
    source: SampleSource
    evaluation: EvaluationHooks
    store: CheckpointStore
    telemetry: Telemetry
    stop: StopRequest
    watchdog: Watchdog
    peak_flops: float | None
    stopwatch: Stopwatch
    profiler: StepProfiler | None
    patience: float
    grad_norm: float = 0.0
    failed: int | None = None

    def __post_init__(self) -> None:
        self.rules = FaultRules(
            recipe=self.recipe,
            plan=self.plan,
            store=self.store,
            telemetry=self.telemetry,
            finish_checkpoint=self._finish_checkpoint,
        )

    def train(self, state: TrainState) -> Outcome:
        """Train from `state` to the end of the plan, changing `state` in place.

        Raises:
            RunError: when too many updates in a row are left out, or loss spikes lead back to the same checkpoint.
        """
        plan, telemetry = self.plan, self.telemetry
        with self.stopwatch.paused():
            asked = self.evaluation.run_unfinished(state)
        if asked.request.stops:
            self.stop.acknowledge()
            return self._stop(state, asked)
        interval = Interval(time.perf_counter())
        while state.step < plan.steps:
            step = state.step
            self.watchdog.beat(f"step {step}")
            if self.profiler is not None:
                self.profiler.before(step + 1)
            with self.stopwatch.part("data"):
                following = plan.batch.at(step + 1) if step + 1 < plan.steps else 0
                batch = self.reader.read(state.position, plan.batch.at(step), state.skipped, following)
            sums, spike = self._forward_backward(state, batch)
            with self.stopwatch.part("optimizer"):
                applied = self._update(step)
            report = self._add_up(sums, recorded=self._is_recorded(step + 1))
            self._update_balance(report, batch)

            state.step += 1
            state.position = batch.next_position
            tokens = len(batch.samples) * plan.sequence_length
            flops, hardware_flops = self._count_flops(report, len(batch.samples))
            state.tokens, state.flops = state.tokens + tokens, state.flops + flops
            interval.add(tokens, flops, hardware_flops)
            if self.profiler is not None and (table := self.profiler.after(state.step)) is not None:
                telemetry.say(table)
            if spike is not None and self.rules.handle_spike(state, batch, spike):
                continue
            self.rules.judge(state, batch, report.scalars, applied, spike)

            if self._is_recorded(state.step):
                self._log(state, report, interval)
                interval = Interval(time.perf_counter())
            began = time.perf_counter()
            with self.stopwatch.paused():
                asked = self.evaluation.run(state, report.asked)
            interval.pause(time.perf_counter() - began)
            if self.store.writing and report.written:
                self._finish_checkpoint(state)
            if self._checkpoint_due(state) or report.overdue or asked.request:
                began = time.perf_counter()
                with self.stopwatch.paused():
                    self._checkpoint(state, wait=asked.request.stops or state.step == plan.steps)
                interval.pause(time.perf_counter() - began)
                self.stop.acknowledge()
            if asked.request.stops and (state.step < plan.steps or state.unfinished):
                return self._stop(state, asked)
        return Outcome("finished")

    def _stop(self, state: TrainState, asked: Asked) -> Outcome:
        """End early, with a checkpoint of this step on the disk."""
        if self.stop.reason is None:
            self.stop.reason = f"rank {asked.rank} was asked to"
        self.telemetry.event("stopped", state.step, reason=self.stop.reason)
        return Outcome("stopped", asked.request)

    def _forward_backward(self, state: TrainState, batch: StepBatch) -> tuple[dict[str, torch.Tensor], float | None]:
        """Run the micro-batches; returns this rank's means and, on a loss spike, the loss that was one."""
        seed_step(self.recipe.seed, state.step, self.ranks.rank)
        capacities, depth = self.plan.recursion.capacities_at(state.step), self.plan.recursion.depth_at(state.step)
        count = len(batch.micro_batches)
        mean_labels = self._mean_labels(batch)
        sums: dict[str, torch.Tensor] = {}
        spike = None
        for index, micro in enumerate(batch.micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == count - 1)
            with self.stopwatch.part("forward"):
                output = self.engine(
                    micro.inputs_BT,
                    micro.labels_BT,
                    documents_BT=micro.documents_BT,
                    valid_BT=micro.valid_BT if self.config.router is not None else None,
                    capacities=capacities,
                    depth=depth,
                    loss_normalizer=mean_labels,
                )
            parts = {"loss": output.loss.detach(), "lm_loss": output.lm_loss}
            if mean_labels is not None:
                parts["lm_loss"] = output.lm_loss * (micro.labelled / mean_labels)
            parts |= {f"aux/{name}": value for name, value in output.aux.items()} | output.stats
            for name, value in parts.items():
                value = value.double() / count
                sums[name] = sums[name] + value if name in sums else value
            loss = output.loss / count
            if index == count - 1 and self.recipe.faults.spike is not None:
                spike = self.rules.find_spike(state, sums["lm_loss"])
                if spike is not None:
                    # The way every ZeRO stage leaves an update out on all ranks alike is a gradient that is not finite.
                    loss = loss * math.nan
            with self.stopwatch.part("backward"):
                # Scaled here, because the number of micro-batches changes during a batch-size warm-up.
                self.engine.backward(loss, scale_wrt_gas=False)
        return sums, spike

    def _mean_labels(self, batch: StepBatch) -> torch.Tensor | None:
        """Labels of a micro-batch in the mean over this step and all ranks, by which each one's loss is divided so
        that the gradient is that of the whole batch; None where every position has a label.
        """
        if self.recipe.data.packing == "concat":
            return None
        labels = torch.tensor(float(batch.labelled), device=self.device)
        with self.stopwatch.part("communication"):
            dist.all_reduce(labels)
        return labels / (len(batch.micro_batches) * self.ranks.world_size)

    def _update(self, step: int) -> bool:
        """Update the weights; False when a non-finite gradient made every rank leave the update out."""
        factor = self.plan.learning_rate.factor(step)
        for group, peak in zip(self.engine.optimizer.param_groups, self.peak_rates):
            group["lr"] = peak * factor
        if not self.engine.zero_optimization():
            for parameter in self.engine.module.parameters():
                # What took no part (while depth warms up) has a gradient of zero under the other stages.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            # Stage 0 has no check of its own. Gradients are already summed, so every rank sees the same ones.
            gradients = [p.grad for p in self.engine.module.parameters()]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.grad_norm = float(norm)
            if not torch.isfinite(norm):
                for parameter in self.engine.module.parameters():
                    parameter.grad = None
                return False
            self.engine.step()
            return True
        self.engine.step()
        self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        return not self.engine.optimizer.overflow

    def _update_balance(self, report: StepReport, batch: StepBatch) -> None:
        """Move the biases of loss-free balancing, where the router has them, by how many tokens went where."""
        if "counts_R" in report.vectors:
            # Whole tokens again, so that rounding of the mean cannot decide which way a bias moves.
            micro_batches = len(batch.micro_batches) * self.ranks.world_size
            counts = [round(count * micro_batches) for count in report.vectors["counts_R"]]
            self.engine.module.update_balance(torch.tensor(counts, device=self.device))

    def _add_up(self, sums: dict[str, torch.Tensor], recorded: bool) -> StepReport:
        """One all-reduce: means over the ranks, memory of every rank, stop requests, who has written its checkpoint,
        and whether another one is overdue.
        """
        world = self.ranks.world_size
        each = torch.zeros(5, world, dtype=torch.float64, device=self.device)  # a column for every rank
        if recorded:
            each[0, self.ranks.rank] = memory_bytes(self.device)
            each[1, self.ranks.rank] = peak_memory_bytes(self.device)
        each[2, self.ranks.rank] = float(self.store.written)
        each[3, self.ranks.rank] = float(self.stop.poll())
        each[4, self.ranks.rank] = float(self.store.overdue)
        names = sorted(sums)
        vector = torch.cat([*(sums[name].reshape(-1) for name in names), each.reshape(-1)])
        with self.stopwatch.part("communication"):
            dist.all_reduce(vector)
            numbers = iter(vector.tolist())
        means = {name: [next(numbers) / world for _ in range(sums[name].numel())] for name in names}
        memory, peaks, written, requests, overdue = ([int(next(numbers)) for _ in range(world)] for _ in range(5))
        return StepReport(
            scalars={name: values[0] for name, values in means.items() if not sums[name].dim()},
            vectors={name: values for name, values in means.items() if sums[name].dim()},
            memory=memory,
            peaks=peaks,
            asked=Asked.strongest(requests),
            written=all(written),
            overdue=any(overdue),
        )

    def _count_flops(self, report: StepReport, sequences: int) -> tuple[float, float]:
        """Training FLOPs of the step, and with what activation checkpointing computes again.

        A sequence counts with its whole length: padding of packed sequences is computed too.
        """
        length = self.plan.sequence_length
        active = [share * length for share in report.vectors["active_R"]]
        count = flops_per_sequence(self.config, length, active=active)
        return sequences * count.training, sequences * count.hardware(self.recipe.activation_checkpointing)

    def _log(self, state: TrainState, report: StepReport, interval: Interval) -> None:
        seconds, steps = time.perf_counter() - interval.since, interval.steps
        values: dict[str, Any] = dict(report.scalars)
        aux = {name.removeprefix("aux/"): values.pop(name) for name in list(values) if name.startswith("aux/")}
        possible = self.peak_flops * self.ranks.world_size * seconds if self.peak_flops else None
        active = report.vectors["active_R"]
        drawn = self.source.drawn(state.position)
        planned = self.plan.training_flops * state.step / self.plan.steps
        self.telemetry.record(
            "train",
            {
                "step": state.step,
                "tokens": state.tokens,
                "flops": state.flops,
                "flops_planned": planned,
                "loss": values.pop("loss"),
                "lm_loss": values.pop("lm_loss"),
                "aux": aux,
                "grad_norm": self.grad_norm,
                "lr": self.engine.optimizer.param_groups[0]["lr"],
                "lr_groups": [group["lr"] for group in self.engine.optimizer.param_groups],
                "tokens_per_second": interval.tokens / seconds,
                "mfu": interval.flops / possible if possible else None,
                "hfu": interval.hardware_flops / possible if possible else None,
                "flops_per_second": interval.flops / seconds,
                "hardware_flops_per_second": interval.hardware_flops / seconds,
                "step_seconds": seconds / steps,
                "pause_seconds": interval.paused,
                "parts": {name: part / steps for name, part in self.stopwatch.take().items()},
                "memory_bytes_per_rank": report.memory,
                "memory_peak_bytes": max(report.peaks),
                "memory_peak_bytes_per_rank": report.peaks,
                "active": active,
                "epochs": self.source.epochs(state.position),
                "samples": drawn,
                "source_share": {name: count / sum(drawn.values()) for name, count in drawn.items()},
                **{name: vector for name, vector in report.vectors.items() if name != "active_R"},
                **values,
            },
        )
        self.telemetry.progress(state.step, report.scalars["lm_loss"], interval.tokens / seconds, seconds / steps)

    def _is_recorded(self, step: int) -> bool:
        return step % self.recipe.logging.every == 0 or step in (1, self.plan.steps)

    def _checkpoint_due(self, state: TrainState) -> bool:
        step, settings = state.step, self.recipe.checkpoint
        best = state.best_validation is not None and state.best_validation[1] == step
        return (
            is_due(step, self.plan.checkpoint_every, self.plan.steps)
            or (settings.log_spaced and _is_power_of_two(step))
            or (settings.keep_best and best)
            or step in self.plan.trunk_checkpoints
            # The next one may be days away: one that failed is tried again after 1, 2, 4, ... steps.
            or (self.failed is not None and _is_power_of_two(step - self.failed))
        )

    def _checkpoint(self, state: TrainState, wait: bool) -> None:
        if self.store.writing:
            self._finish_checkpoint(state)
        self.watchdog.beat(f"checkpoint after step {state.step}", allow=self.patience)
        self.store.begin(state)
        if wait or not self.recipe.checkpoint.asynchronous:
            self._finish_checkpoint(state)

    def _finish_checkpoint(self, state: TrainState) -> None:
        self.watchdog.beat(f"checkpoint by step {state.step}", allow=self.patience)
        problem = self.store.finish()
        # A time limit must leave room for the slowest one so far, on a file system that may be slower then.
        self.stop.reserve = max(self.stop.reserve, 2 * self.store.seconds)
        self.telemetry.sync()
        if problem is None:
            self.failed = None
            return
        self.failed = state.step if self.failed is None else self.failed
        self.telemetry.event("checkpoint_failed", state.step, problem=problem)
        self.telemetry.say(
            f"No checkpoint at step {state.step}: {problem}. Training goes on and tries again; older ones stay valid."
        )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
