"""What a report knows of one run: read from the run folder's files, checked, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.flops import count_parameters, kv_bytes_per_token
from pretrain.comparison.experiment import Trial
from pretrain.errors import RunError
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class Curve:
    """One measured quantity along a run: equally long lists of tokens, counted training FLOPs and the value, in
    order of steps.
    """

    tokens: list[float]
    flops: list[float]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    def at_tokens(self, tokens: float) -> float | None:
        """The value at `tokens` by linear interpolation; None outside what was measured."""
        for index in range(1, len(self.tokens)):
            left, right = self.tokens[index - 1], self.tokens[index]
            if left <= tokens <= right:
                share = (tokens - left) / (right - left) if right > left else 1.0
                return self.values[index - 1] + share * (self.values[index] - self.values[index - 1])
        return None

    def flops_at(self, tokens: float) -> float | None:
        """Training FLOPs spent when `tokens` had been seen; None outside what was measured."""
        return Curve(self.tokens, self.flops, self.flops).at_tokens(tokens)


@dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
        value: the number; stderr: its standard error over the examples, None where the evaluation gave none.
        n: examples; routing: `causal` or `topk`; chance: what guessing would score, None where that means nothing.
        higher_is_better: which way is good.
        headline: whether this is the one figure that stands for its suite.
        sums, weights: where the evaluation kept them, what each example adds to the numerator and the denominator of
            `value`, so that two arms can be compared example by example.
    """

    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    routing: str
    chance: float | None = None
    higher_is_better: bool = True
    headline: bool = False
    sums: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """One run as far as it has come.

    Attributes:
        trial: which arm, seed and budget; label: what to call the arm.
        state: running, finished, stopped, failed, or absent; problem: why numbers are missing, None when the run is
            complete.
        config: the network; None when the folder does not say.
        plan, environment: the files' contents, empty when absent.
        training: training language-model loss; validation: per routing (`causal`, `topk`), summed up over sources by
            the trainer.
        last_training: the last training record.
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
    last_training: dict[str, Any] = field(default_factory=dict)
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
    def counted_flops(self) -> float | None:
        """Training FLOPs as counted step by step from the tokens that were active."""
        return self.last_training.get("flops")

    @property
    def tokens(self) -> float | None:
        return self.last_training.get("tokens")

    @property
    def routed(self) -> bool:
        """Whether routers decide how deep a token goes."""
        return self.config is not None and self.config.router is not None

    def mean_depth(self, looked_at: str) -> float | None:
        """Mean recursion steps per token; see `depths`."""
        shares = self.depths.get(looked_at)
        return sum(depth * share for depth, share in enumerate(shares)) if shares else None

    @property
    def parameters(self) -> dict[str, int]:
        """Counts of `mor_model.flops.count_parameters`; empty when the network is not known."""
        return dataclasses.asdict(count_parameters(self.config)) if self.config else {}

    @property
    def kv_bytes(self) -> float | None:
        return kv_bytes_per_token(self.config) if self.config else None

    def score(self, task: str, metric: str) -> Score | None:
        return next((score for score in self.scores if score.task == task and score.metric == metric), None)

    def final_validation(self, routing: str) -> float | None:
        curve = self.validation.get(routing)
        return curve.values[-1] if curve else None


def read_run(trial: Trial, label: str, suites: tuple[str, ...] = ()) -> RunRecord:
    """Everything the run folder of `trial` says.

    A folder that is missing, damaged or unfinished gives a record whose `problem` says so; it never raises, because a
    report of the other arms must still be possible.

    Args:
        suites: evaluations that should be there.
    """
    run = RunFolder(trial.folder)
    if not run.path.is_dir():
        return RunRecord(trial, label, "absent", f"{run}: not trained yet.")
    try:
        status = run.status()
        record = RunRecord(trial, label, status.get("state", "absent"), None, **_training_files(run))
        record = dataclasses.replace(record, **_evaluation_files(run))
        problem = _why_incomplete(run, status, record, suites)
    except (RunError, ConfigError, KeyError, TypeError, ValueError) as error:
        return RunRecord(trial, label, "unreadable", f"{run}: {_reason(error)}")
    return dataclasses.replace(record, problem=problem)


def _training_files(run: RunFolder) -> dict[str, Any]:
    plan = run.plan()
    config = ModelConfig.from_dict(run.model())
    train = _by_step(run.metrics("train")) if run.metrics_file.is_file() else []
    found: dict[str, Any] = {"plan": plan, "config": config, "environment": run.environment()}
    if train:
        # The first steps pay for warming up (compilation, caches, page faults) and would pull the median of a short
        # run.
        steady = train[len(train) // 10 :]
        found |= {
            "training": _curve(train, [record.get("lm_loss", record["loss"]) for record in train]),
            "last_training": train[-1],
            "tokens_per_second": _median(
                [record["tokens_per_second"] for record in steady if "tokens_per_second" in record]
            ),
            "step_seconds": _median([record["step_seconds"] for record in steady if "step_seconds" in record]),
            "memory_peak_bytes": max((record.get("memory_peak_bytes") or 0 for record in train), default=0) or None,
        }
        found |= {"validation": _validation(run)}
        if shares := _shares_of(train[-1].get("active")):
            found |= {"depths": {"training": shares}}
    return found


def _validation(run: RunFolder) -> dict[str, Curve]:
    """One curve per routing. Several sources of one step are averaged by the tokens evaluated."""
    by_step: dict[int, dict[str, dict[str, Any]]] = {}
    for record in run.metrics("validation"):
        by_step.setdefault(record["step"], {})[str(record.get("source"))] = record
    curves = {}
    for routing in ("causal", "topk"):
        key, rows, values = f"loss_{routing}", [], []
        for _, sources in sorted(by_step.items()):
            parts = [record for record in sources.values() if record.get(key) is not None]
            if not parts:
                continue
            weights = [record.get("tokens_evaluated") or 1 for record in parts]
            rows.append(parts[0])
            values.append(sum(weight * part[key] for weight, part in zip(weights, parts)) / sum(weights))
        if rows:
            curves[routing] = _curve(rows, values)
    return curves


def _evaluation_files(run: RunFolder) -> dict[str, Any]:
    """Figures with causal routing at free depth, the only ones whose files carry a suite's plain name."""
    found: dict[str, Any] = {"scores": [], "skipped": [], "evaluated": []}
    for file in sorted(run.evaluation.glob("*.json")):
        try:
            _add_suite(run.read_json(file), file.stem, found)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{file}: not a result of `mor eval` ({_reason(error)}); remove it and evaluate again."
            ) from None
    return found


def _add_suite(content: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    suite = content["suite"]
    if name != suite:
        return
    found["evaluated"].append(suite)
    found["skipped"] += [
        {key: str(entry.get(key, "")) for key in ("task", "why", "how")} for entry in content["skipped"]
    ]
    for task, result in content["tasks"].items():
        found["scores"] += _scores(suite, task, result, content.get("primary") or {})
        if histogram := result.get("depth_histogram"):
            found["depths"] = histogram


def _why_incomplete(run: RunFolder, status: dict[str, Any], record: RunRecord, suites: tuple[str, ...]) -> str | None:
    state = status.get("state", "absent")
    step, steps = record.last_training.get("step"), record.plan.get("steps")
    where = f" at step {step} of {steps}" if step is not None and steps else ""
    if state == "failed":
        return f"{run}: training failed{where}: {status.get('reason', 'no reason was recorded')}"
    if state == "running":
        return f"{run}: training is running, or was killed{where}."
    if state != "finished":
        return f"{run}: training {'has not begun' if state == 'absent' else f'was {state}'}{where}."
    missing = [suite for suite in suites if suite not in record.evaluated]
    if missing:
        return f"{run}: trained, but not evaluated on {', '.join(missing)}."
    return None


def _by_step(records: Any) -> list[dict[str, Any]]:
    """Records in order of steps; of a step logged twice (a resumed run repeats the steps after its checkpoint) the
    later one.
    """
    latest = {record["step"]: record for record in records}
    return [latest[step] for step in sorted(latest)]


def _curve(records: list[dict[str, Any]], values: list[float]) -> Curve:
    return Curve(
        [float(record["tokens"]) for record in records],
        [float(record["flops"]) for record in records],
        [float(v) for v in values],
    )


def _median(values: list[float]) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _reason(error: Exception) -> str:
    return f"a record lacks {error}" if isinstance(error, KeyError) else str(error)


def _shares_of(active: list[float] | None) -> list[float] | None:
    """Share of tokens that took exactly 0..R steps, from the share that took at least 1..R."""
    if not active:
        return None
    at_least = [1.0, *active, 0.0]
    return [max(0.0, at_least[depth] - at_least[depth + 1]) for depth in range(len(active) + 1)]


def _scores(suite: str, task: str, result: dict[str, Any], headline: dict[str, Any]) -> list[Score]:
    stderr = result.get("stderr") or {}
    metrics = dict(result["metrics"])
    if (perplexity := metrics.get("token_perplexity")) is not None:
        # The loss is its logarithm, and its standard error that of the logarithm to first order.
        metrics = {"loss": math.log(perplexity), **metrics}
        error = stderr.get("token_perplexity")
        stderr = {"loss": None if error is None else error / perplexity, **stderr}
    higher = result.get("higher_is_better", {})
    documents = result.get("documents", {})
    return [
        Score(
            suite=suite,
            task=task,
            metric=metric,
            value=float(value),
            stderr=stderr.get(metric),
            n=result.get("n"),
            routing=result["routing"],
            chance=result.get("chance") if metric.startswith("acc") else None,
            higher_is_better=higher.get(metric, False),
            headline=(task, metric) == (headline.get("task"), headline.get("metric")),
            sums=tuple(documents.get("nats", ())) if metric == "loss" else (),
            weights=tuple(documents.get("tokens", ())) if metric == "loss" else (),
        )
        for metric, value in metrics.items()
        if value is not None
    ]
