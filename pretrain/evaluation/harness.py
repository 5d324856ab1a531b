"""Few-shot suites through lm-evaluation-harness: its task files, our data, our network.

The harness builds the questions and judges the answers, except that ties share a point (`points`). Standard errors are
computed here, because the harness's bootstrap starts a process pool per metric.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from mor_model.errors import ConfigError
from pretrain.errors import UserError
from pretrain.evaluation.held_out import text_identity
from pretrain.evaluation.lm_adapter import HarnessModel
from pretrain.evaluation.perplexity import NEED_WHOLE_TEXT, jackknife
from pretrain.evaluation.points import counting_ties, shared_points
from pretrain.evaluation.suites import skipped
from pretrain.evaluation.task_files import TaskPlan


@dataclass(frozen=True)
class Sample:
    """A question, the harness's answered requests, and the value of each metric for this question alone."""

    doc: Any
    requests: list[Any]
    metrics: dict[str, Any]

    @property
    def nats(self) -> list[float]:
        """Log-likelihoods of the answers; generated text has none."""
        values = [request.resps[0] for request in self.requests]
        return [value[0] if isinstance(value, tuple) else value for value in values if not isinstance(value, str)]

    @property
    def finite(self) -> bool:
        """Whether every answer has a likelihood."""
        return all(map(math.isfinite, self.nats))


def run_tasks(
    model: HarnessModel, plan: TaskPlan, fewshot: int = 0, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate the tasks of a plan. Tasks whose data the hub does not give are added to the plan's `skipped`.

    Args:
        fewshot: examples before each question.
        limit: number of documents of each task, from the first.

    Returns:
        By task: metrics (NaN where the network gives no numbers), stderr (None where there is none), n, not_finite
        (questions without a finite likelihood), lost_bytes (of scored text, see `perplexity`), prompts_cut (questions
        whose prompt did not fit), text_bytes and text_sha256 (of what was asked), split, fewshot, higher_is_better.

    Raises:
        DataError: questions that a task cannot be made of, naming their file.
    """
    _quiet()
    with tempfile.TemporaryDirectory(prefix="mor-tasks-") as folder:
        from lm_eval.tasks import TaskManager

        for name, text in (plan.local | plan.hub).items():
            (Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")
        # Indexing the harness's thousands of task files would take seven seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        tasks: dict[str, Any] = {}
        for name in plan.local:
            with _records_of(name, plan):
                tasks |= manager.load([name])["tasks"]
        for name in plan.hub:
            try:
                tasks |= manager.load([name])["tasks"]
            except Exception as error:  # the hub's libraries pass on every error of their transport
                reason = str(error).strip().splitlines() or [type(error).__name__]
                plan.skipped.append(skipped(name, f"the hub did not give its data ({reason[0]})"))
        for name, task in tasks.items():
            task.set_config(key="num_fewshot", value=fewshot)
            task.set_fewshot_seed(seed=1234)
            with _records_of(name, plan):
                task.build_all_requests(limit=limit, rank=0, world_size=1)
        _answer(model, tasks)
        made = {}
        for name, task in tasks.items():
            with _records_of(name, plan):
                samples = _judge(task)
            made[name] = {
                **_figures(task, samples, model),
                "prompts_cut": sum((name, sample.requests[0].doc_id) in model.cut for sample in samples),
                "split": "test" if task.has_test_docs() else "validation",
                "fewshot": fewshot,
            }
        return made


@contextmanager
def _records_of(name: str, plan: TaskPlan) -> Iterator[None]:
    """Records that the task cannot use make the harness raise all kinds of errors; they become a `DataError`."""
    try:
        yield
    except (DataError, UserError, ConfigError, OSError, MemoryError):
        raise
    except Exception as error:
        places = ", ".join(map(str, plan.files.get(name, []))) or "its data on the hub"
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{name}: {places}: not the records that this task asks about ({problem:.500}); fetch them again, or leave "
            "the suite out."
        ) from None


def _answer(model: HarnessModel, tasks: dict[str, Any]) -> None:
    """Put every request's answer into it; requests of one kind go to the model together, whatever their task."""
    by_kind: dict[str, list[Any]] = {}
    for task in tasks.values():
        for request in task.instances:
            by_kind.setdefault(request.request_type, []).append(request)
    for kind, requests in by_kind.items():
        for request, answer in zip(requests, getattr(model, kind)(requests), strict=True):
            request.resps.append(answer)


def _judge(task: Any) -> list[Sample]:
    task.apply_filters()
    by_document: dict[int, list[Any]] = {}
    for request in task.instances:
        by_document.setdefault(request.doc_id, []).append(request)
    samples = []
    for requests in by_document.values():
        requests.sort(key=lambda request: request.idx)
        doc = requests[0].doc
        answers = [next(iter(request.filtered_resps.values())) for request in requests]
        with np.errstate(all="ignore"):  # a network without numbers; `_figures` reports it
            metrics = task.process_results(doc, answers)
        sample = Sample(doc, requests, metrics)
        if sample.finite and task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results):
            metrics.update(shared_points(metrics, task, doc, answers))
        elif sample.finite and task.OUTPUT_TYPE == "loglikelihood" and "acc" in metrics:
            metrics["acc"] = float(answers[0][1])
        samples.append(sample)
    return samples


def _figures(task: Any, samples: Sequence[Sample], model: HarnessModel) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    documents: dict[str, Any] = {}
    not_finite = sum(not sample.finite for sample in samples)

    def add(name: str, aggregation: Any, items: Sequence[Any]) -> None:
        metrics[name], stderr[name] = (math.nan, None) if not_finite else _aggregate(aggregation, items)

    for name in samples[0].metrics:
        add(name, task.aggregation()[name], [sample.metrics[name] for sample in samples])
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        scored = [sample.requests[0].args[0] for sample in samples]
        tokens = [len(model.tok_encode(text)) for text in scored]
        nats = [sample.nats[0] for sample in samples]
        documents = {"documents": {"nats": [-value for value in nats], "tokens": tokens}}
        add("token_perplexity", _token_perplexity, list(zip(nats, tokens)))
    else:
        answers = [answer for sample in samples if (answer := _right_answer(task, sample)) is not None]
        scored = [text for _, text in answers]
        if answers:
            add("bits_per_byte", _bits_per_byte, [(nats, len(text.encode("utf-8"))) for nats, text in answers])
    lost = model.lost_bytes(scored)
    if lost:
        refused = metrics.keys() & set(NEED_WHOLE_TEXT)
        metrics |= dict.fromkeys(refused, math.nan)
        stderr |= dict.fromkeys(refused)
    asked = [part for sample in samples for request in sample.requests for part in request.args if type(part) is str]
    higher = {name: bool(value) for name, value in task.higher_is_better().items()}
    return {
        "metrics": metrics,
        "stderr": stderr,
        "n": len(samples),
        "not_finite": not_finite,
        "lost_bytes": lost,
        "scored_bytes": sum(len(text.encode("utf-8")) for text in scored),
        **text_identity(asked),
        "higher_is_better": {"bits_per_byte": False, **higher},
        **documents,
    }


def _aggregate(aggregation: Any, items: Sequence[Any]) -> tuple[float, float | None]:
    """(a metric over all questions, its standard error)"""
    statistic = counting_ties(aggregation)
    value = statistic(items)
    if all(isinstance(item, (int, float)) for item in items) and math.isclose(
        value, statistics.fmean(items), rel_tol=1e-9
    ):
        return value, statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
    return value, jackknife(statistic, items)


def _right_answer(task: Any, sample: Sample) -> tuple[float, str] | None:
    """(log-likelihood in nats, text) of the right answer; None where there is not exactly one."""
    gold = task.doc_to_text(sample.doc) if task.multiple_input else task.doc_to_target(sample.doc)
    if task.OUTPUT_TYPE == "loglikelihood":
        gold = 0
    if not isinstance(gold, int) or not 0 <= gold < len(sample.requests) or task.OUTPUT_TYPE == "generate_until":
        return None
    return sample.nats[gold], sample.requests[gold].args[1]


def _bits_per_byte(answers: Sequence[tuple[float, int]]) -> float:
    return -math.fsum(nats for nats, _ in answers) / sum(size for _, size in answers) / math.log(2)


def _token_perplexity(scores: Sequence[tuple[float, int]]) -> float:
    return math.exp(-math.fsum(nats for nats, _ in scores) / sum(tokens for _, tokens in scores))


@functools.cache
def _quiet() -> None:
    """Let the harness and `datasets` report errors only; they would report every task on standard error."""
    import datasets
    import lm_eval.api.task as harness

    datasets.disable_progress_bars()
    harness.tqdm = functools.partial(harness.tqdm, disable=True)
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # F1 of a handful of answers is often undefined, which its value of 0 says already.
    warnings.filterwarnings("ignore", module="sklearn")
