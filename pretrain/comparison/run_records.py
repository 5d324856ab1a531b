"""One run as a report sees it, read from the run folder's files and checked."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_prep.plain_text import plain
from data_prep.terminal import duration
from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.flops import count_parameters, kv_bytes_per_token
from pretrain.comparison import numbers, scores
from pretrain.comparison.experiment import Trial
from pretrain.comparison.scores import Score
from pretrain.errors import RunError
from pretrain.records.fields import Fields
from pretrain.records.run_folder import RunFolder


@dataclass(frozen=True)
class Curve:
    """One measured quantity along a run: equally long lists of tokens, counted training FLOPs and the value, in
    order of steps. Values may be nan: not finite.
    """

    tokens: list[float]
    flops: list[float]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    def at_tokens(self, tokens: float) -> float | None:
        """The value at `tokens` by linear interpolation; None outside what was measured."""
        if not self.tokens or not self.tokens[0] <= tokens <= self.tokens[-1]:
            return None
        return float(np.interp(tokens, self.tokens, self.values))

    def flops_at(self, tokens: float) -> float | None:
        """Training FLOPs spent when `tokens` had been seen; None outside what was measured."""
        return replace(self, values=self.flops).at_tokens(tokens)


@dataclass(frozen=True)
class RunRecord:
    """One run as far as it has come.

    Attributes:
        trial: which arm, seed and budget; label: what to call the arm.
        state: running, finished, stopped, failed, absent, unreadable or outdated; problem: why numbers are missing.
        config: the network; None when the folder does not say.
        plan, environment: the files' contents, empty when absent.
        training: training language-model loss; validation: per routing (`causal`, `topk`), averaged over sources;
            validated_on: the sources and how much of each was read.
        step: of the last training record; tokens, counted_flops: seen and spent by then, as counted step by step from
            the tokens that were active.
        parameters: counts of `mor_model.flops.count_parameters`, empty when the network is not known; kv_bytes: of the
            cache, per token.
        tokens_per_second, step_seconds: medians over the records after the first tenth.
        memory_peak_bytes: largest of any record.
        scores: all evaluation numbers; skipped: what evaluation left out, with reason and remedy.
        depths: share of tokens that took 0, 1, ... R recursion steps, by what was looked at: `causal` and `topk` on the
            held-out test text, `training` (top-k) in the last training record.
    """

    trial: Trial
    label: str
    state: str
    problem: str | None
    config: ModelConfig | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    training: Curve = Curve([], [], [])
    validation: dict[str, Curve] = field(default_factory=dict)
    validated_on: str = ""
    step: int | None = None
    tokens: float | None = None
    counted_flops: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    kv_bytes: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    memory_peak_bytes: float | None = None
    scores: list[Score] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    depths: dict[str, list[float]] = field(default_factory=dict)
    evaluated: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def routed(self) -> bool:
        """Whether routers decide how deep a token goes."""
        return self.config is not None and self.config.router is not None

    @property
    def training_flops_per_token(self) -> float | None:
        return 3 * self.plan["flops_per_token_forward"] if self.plan else None

    def mean_depth(self, looked_at: str) -> float | None:
        """Mean recursion steps per token; see `depths`."""
        shares = self.depths.get(looked_at)
        return sum(depth * share for depth, share in enumerate(shares)) if shares else None

    def time_for(self, tokens: float | None) -> str:
        """How long training on this many tokens takes at the run's own speed, in words."""
        return duration(tokens / self.tokens_per_second) if tokens and self.tokens_per_second else numbers.MISSING

    def score(self, task: str, metric: str) -> Score | None:
        return next((score for score in self.scores if score.task == task and score.metric == metric), None)

    def final_validation(self, routing: str) -> float | None:
        curve = self.validation.get(routing)
        return curve.values[-1] if curve else None

    def validation_at(self, routing: str, tokens: float) -> float | None:
        curve = self.validation.get(routing)
        return curve.at_tokens(tokens) if curve else None


def read_run(trial: Trial, label: str, suites: Sequence[str] = ()) -> RunRecord:
    """What the run folder of `trial` says; `suites` are the evaluations that it should hold.

    A folder that is missing, damaged or unfinished gives a record whose `problem` says so, so that the other arms can
    still be reported.
    """
    run = RunFolder(trial.folder)
    if not run.path.is_dir():
        return RunRecord(trial, label, "absent", f"{run}: not trained yet.")
    try:
        status = run.status()
        record = RunRecord(trial, label, status.get("state", "absent"), None, **_training_files(run))
        record = replace(record, **_evaluation_files(run, record.depths))
    except (RunError, ConfigError) as error:
        return RunRecord(trial, label, "unreadable", plain(f"{run}: {str(error).removeprefix(f'{run}: ')}"))
    return replace(record, state=plain(record.state), problem=_problem(run, status, record, suites))


def _training_files(run: RunFolder) -> dict[str, Any]:
    plan = Fields(run.plan(), run.plan_file)
    for name in ("steps", "flops_per_token_forward"):
        plan.amount(name)
    for name in ("tokens_per_step", "sequence_length", "training_flops", "decay_steps"):
        plan.amount(name, None)
    environment = Fields(run.environment(), run.environment_file)
    environment.object("versions")
    config = ModelConfig.from_dict(run.model())
    found: dict[str, Any] = {
        "plan": plan.values,
        "environment": environment.values,
        "config": config,
        "parameters": dataclasses.asdict(count_parameters(config)),
        "kv_bytes": kv_bytes_per_token(config),
    }
    train = [list(records.values())[-1] for records in _by_step(run, "train")] if run.metrics_file.is_file() else []
    if train:
        # The first steps are slow (compilation, caches, page faults) and would distort the median of a short run.
        steady = train[len(train) // 10 :]
        last = train[-1]
        found |= {
            # Of the language model alone where the record has it.
            "training": _curve(train, [r.number("lm_loss" if "lm_loss" in r.values else "loss") for r in train]),
            "step": last.values["step"],
            "tokens": last.amount("tokens"),
            "counted_flops": last.amount("flops"),
            "tokens_per_second": _median(steady, "tokens_per_second"),
            "step_seconds": _median(steady, "step_seconds"),
            "memory_peak_bytes": max(record.amount("memory_peak_bytes", 0) for record in train) or None,
        }
        found |= _validation(run)
        if active := last.shares("active"):  # shares of tokens that took at least 1..R steps
            at_least = [1.0, *active, 0.0]
            exactly = [max(0.0, more - fewer) for more, fewer in itertools.pairwise(at_least)]
            found["depths"] = {"training": exactly}
    return found


def _by_step(run: RunFolder, kind: str) -> list[dict[str, Fields]]:
    """For every step in order, its records by source. Of one logged twice (a resumed run repeats the steps after its
    checkpoint) the later.
    """
    found: dict[int, dict[str, Fields]] = {}
    for record in run.metrics(kind):
        step, source = record["step"], str(record.get("source"))
        found.setdefault(step, {})[source] = Fields(record, f"{run.metrics_file}: {kind} record of step {step}")
    return [found[step] for step in sorted(found)]


def _validation(run: RunFolder) -> dict[str, Any]:
    """One curve per routing, and what was read. Several sources of one step are averaged by the tokens evaluated."""
    by_step = _by_step(run, "validation")
    curves = {}
    for routing in ("causal", "topk"):
        key, rows, values = f"loss_{routing}", [], []
        for sources in by_step:
            parts = [record for record in sources.values() if key in record.values]
            if not parts:
                continue
            weights = [record.amount("tokens_evaluated", 1) or 1 for record in parts]
            rows.append(parts[0])
            values.append(sum(weight * part.number(key) for weight, part in zip(weights, parts)) / sum(weights))
        if rows:
            curves[routing] = _curve(rows, values)
    last = by_step[-1] if by_step else {}
    read = (f"{name}: {numbers.whole(record.amount('tokens_evaluated', None))} tokens" for name, record in last.items())
    data = run.plan().get("data_manifest")
    # That of a mixture depends on the order of its sources too.
    manifest = f" (manifest {data[:12]})" if data and len(last) == 1 else ""
    return {"validation": curves, "validated_on": plain(", ".join(sorted(read)) + manifest)}


def _evaluation_files(run: RunFolder, depths: dict[str, list[float]]) -> dict[str, Any]:
    """Figures with causal routing at free depth, the only ones whose files carry a suite's plain name."""
    found: dict[str, Any] = {"scores": [], "skipped": [], "evaluated": [], "depths": depths}
    for file in sorted(run.evaluation.glob("*.json")):
        content = Fields(run.read_json(file), file)
        suite = content.text("suite")
        if file.stem != suite:
            continue
        found["evaluated"].append(suite)
        for entry in content.objects("skipped"):
            told = {key: plain(entry.get(key, "")) for key in ("task", "why", "how")}
            found["skipped"].append({**told, "suite": suite})
        headline = content.object("primary")
        for task, result in content.object("tasks").items():
            fields = Fields(result, f"{file}: task {task!r:.100}")
            found["scores"] += scores.read_task(suite, task, fields, headline)
            if histogram := fields.object("depth_histogram"):
                shares = Fields(histogram, f"{fields.where}: depth_histogram")
                found["depths"] = {plain(name): shares.shares(name) for name in histogram}
    return found


def _problem(run: RunFolder, status: dict[str, Any], record: RunRecord, suites: Sequence[str]) -> str | None:
    """Why numbers of this run are missing, or are none."""
    state = record.state
    steps = record.plan.get("steps")
    where = f" at step {record.step} of {steps}" if record.step is not None and steps else ""
    if state == "failed":
        return plain(f"{run}: training failed{where}: {status.get('reason', 'no reason was recorded')}")
    if state == "running":
        return plain(f"{run}: training is running, or was killed{where}.")
    if state != "finished":
        return plain(f"{run}: training {'has not begun' if state == 'absent' else f'was {state}'}{where}.")
    problems = []
    if record.training and not math.isfinite(record.training.values[-1]):
        problems.append("ended with a training loss that is not finite, so its figures say nothing of the arm")
    if missing := [suite for suite in suites if suite not in record.evaluated]:
        problems.append(f"trained, but not evaluated on {', '.join(missing)}")
    return plain(f"{run}: {'; '.join(problems)}.") if problems else None


def _curve(records: list[Fields], values: list[float]) -> Curve:
    return Curve(
        [record.amount("tokens") for record in records], [record.amount("flops") for record in records], values
    )


def _median(records: list[Fields], name: str) -> float | None:
    values = [value for record in records if (value := record.amount(name, None)) is not None]
    return statistics.median(values) if values else None
