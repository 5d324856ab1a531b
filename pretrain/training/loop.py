"""THE training loop.

One step: read the batch at the current position, run its micro-batches, update, reduce statistics over the ranks,
record them, then evaluate, write a checkpoint or stop if it is time to. A resumed run needs `TrainState` and
DeepSpeed's own state; everything else is a function of the step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mor_model.flops import flops_per_sequence
from pretrain.checkpoints.store import CheckpointStore, TrainState
from pretrain.ranks.signals import Asked, Request
from pretrain.records.profiling import StepProfiler
from pretrain.records.stopwatch import Stopwatch, memory_bytes, peak_memory_bytes
from pretrain.records.telemetry import Telemetry
from pretrain.training.batches import BatchReader, StepBatch
from pretrain.training.engine import peak_flops, seed_step, update
from pretrain.training.evaluate_in_training import EvaluationHooks
from pretrain.training.faults import FaultRules
from pretrain.training.optimizer import Scheduler
from pretrain.training.prepare import Prepared
from pretrain.training.session import Session


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
        written: whether every rank has written its checkpoint files; overdue: whether `checkpoint.every_minutes` have
            passed since the last checkpoint.
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
        left_out: seconds of evaluation and checkpoints.
    """

    since: float
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    hardware_flops: float = 0.0
    left_out: float = 0.0

    @contextmanager
    def paused(self, stopwatch: Stopwatch) -> Iterator[None]:
        """Leave out the time in which no step is taken."""
        began = time.perf_counter()
        with stopwatch.paused():
            yield
        seconds = time.perf_counter() - began
        self.since += seconds
        self.left_out += seconds

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
        engine: DeepSpeed's; scheduler: of its optimiser's learning rates.
        grad_norm: of the last step, before clipping.
    """

    run: Prepared
    session: Session
    engine: Any
    scheduler: Scheduler
    reader: BatchReader
    evaluation: EvaluationHooks
    store: CheckpointStore
    telemetry: Telemetry
    stopwatch: Stopwatch
    profiler: StepProfiler | None
    grad_norm: float = 0.0

    def __post_init__(self) -> None:
        self.recipe, self.plan, self.network = self.run.recipe, self.run.plan, self.run.network
        self.ranks, self.device = self.session.ranks, self.session.device
        self.stop, self.watchdog = self.session.stop, self.session.watchdog
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
                self.scheduler.set(step)
                applied, self.grad_norm = update(self.engine)
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
            with interval.paused(self.stopwatch):
                asked = self.evaluation.run(state, report.asked)
            if report.written:
                self._finish_checkpoint(state)
            if self.store.due(state) or report.overdue or asked.request:
                with interval.paused(self.stopwatch):
                    self._checkpoint(state, wait=asked.request.stops or state.step == plan.steps)
                self.stop.acknowledge()
            if asked.request.stops and (state.step < plan.steps or state.unfinished):
                return self._stop(state, asked)
        return Outcome("finished")

    def close(self) -> None:
        """End the threads, the records and the engine."""
        self.reader.close()
        self.store.close()
        self.telemetry.close()
        self.engine.destroy()

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
                    valid_BT=micro.valid_BT if self.network.router is not None else None,
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
                    # At every ZeRO stage all ranks skip an update together when a gradient is not finite.
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
        count = flops_per_sequence(self.network, length, active=active)
        return sequences * count.training, sequences * count.hardware(self.recipe.activation_checkpointing)

    def _log(self, state: TrainState, report: StepReport, interval: Interval) -> None:
        seconds, steps = time.perf_counter() - interval.since, interval.steps
        values: dict[str, Any] = dict(report.scalars)
        aux = {name.removeprefix("aux/"): values.pop(name) for name in list(values) if name.startswith("aux/")}
        peak = peak_flops(self.device)
        possible = peak * self.ranks.world_size * seconds if peak else None
        active = report.vectors["active_R"]
        drawn = self.run.data.source.drawn(state.position)
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
                "lr": self.scheduler.rates[0],
                "lr_groups": self.scheduler.rates,
                "tokens_per_second": interval.tokens / seconds,
                "mfu": interval.flops / possible if possible else None,
                "hfu": interval.hardware_flops / possible if possible else None,
                "flops_per_second": interval.flops / seconds,
                "hardware_flops_per_second": interval.hardware_flops / seconds,
                "step_seconds": seconds / steps,
                "pause_seconds": interval.left_out,
                "parts": {name: part / steps for name, part in self.stopwatch.take().items()},
                "memory_bytes_per_rank": report.memory,
                "memory_peak_bytes": max(report.peaks),
                "memory_peak_bytes_per_rank": report.peaks,
                "active": active,
                "epochs": self.run.data.source.epochs(state.position),
                "samples": drawn,
                "source_share": {name: count / sum(drawn.values()) for name, count in drawn.items()},
                **{name: vector for name, vector in report.vectors.items() if name != "active_R"},
                **values,
            },
        )
        self.telemetry.progress(state.step, report.scalars["lm_loss"], interval.tokens / seconds, seconds / steps)

    def _is_recorded(self, step: int) -> bool:
        return step % self.recipe.logging.every == 0 or step in (1, self.plan.steps)

    def _checkpoint(self, state: TrainState, wait: bool) -> None:
        self._finish_checkpoint(state)
        self.watchdog.beat(f"checkpoint after step {state.step}", allow=self.session.patience)
        self.store.begin(state)
        if wait or not self.recipe.checkpoint.asynchronous:
            self._finish_checkpoint(state)

    def _finish_checkpoint(self, state: TrainState) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        if not self.store.writing:
            return
        self.watchdog.beat(f"checkpoint by step {state.step}", allow=self.session.patience)
        problem = self.store.finish(state.step)
        # A time limit must leave room for the slowest one so far, on a file system that may be slower then.
        self.stop.reserve = max(self.stop.reserve, 2 * self.store.seconds)
        self.telemetry.sync()
        if problem is not None:
            self.telemetry.event("checkpoint_failed", state.step, problem=problem)
            self.telemetry.say(
                f"No checkpoint at step {state.step}: {problem}. Training goes on and tries again; older ones stay "
                "valid."
            )
