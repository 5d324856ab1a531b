"""Few-shot suites through lm-evaluation-harness: its task files, our data, our network.

A suite's tasks are the harness's own files, each included by a small task file that says where the data lies. The
harness builds the questions and judges the answers; standard errors are computed here, because its bootstrap starts a
process pool per metric.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.evaluation.lm_adapter import HarnessModel
from pretrain.evaluation.perplexity import jackknife
from pretrain.evaluation.suites import Suite, skipped

_ROLES = ("training", "validation", "test", "fewshot")


def local_task_file(
    source: Path,
    splits: dict[str, Path],
    settings: dict[str, Any],
    where: dict[str, str] | None = None,
    limit: int | None = None,
) -> str:
    """Text of a task file that includes `source` and reads its splits from files, through `local_data.read_splits`.

    Args:
        source: the task file that words the questions.
        splits: file of each split by role (training, validation, test, fewshot).
        settings: entries that replace those of `source`, the task's name at least.
        where, limit: see `local_data.read_splits`.
    """
    arguments = {"splits": {role: str(file) for role, file in splits.items()}, "where": where, "limit": limit}
    text = {**_from_files(source, splits, settings), "dataset_kwargs": arguments}
    # A tag is not something safe_dump writes for plain values.
    return (
        yaml.safe_dump(text, sort_keys=False) + "custom_dataset: !function pretrain.evaluation.local_data.read_splits\n"
    )


def portable_task_file(source: Path, splits: dict[str, Path]) -> str:
    """As `local_task_file`, read through the `datasets` library: what a harness without this project can run."""
    files = {role: str(file.resolve()) for role, file in splits.items()}
    text = {**_from_files(source, splits, {}), "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    return yaml.safe_dump(text, sort_keys=False)


def _from_files(source: Path, splits: dict[str, Path], settings: dict[str, Any]) -> dict[str, Any]:
    roles = {f"{role}_split": role if role in splits else None for role in _ROLES}
    return {"include": str(source), "dataset_name": None, **roles, **settings}


def task_settings(source: Path) -> dict[str, Any]:
    """Entries of a harness task file itself, without what it includes."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load(source.read_text(encoding="utf-8"), Loader=Loader)


@dataclass
class TaskPlan:
    """Task files to run, by task name: `local` ones read files, `hub` ones the hub; `skipped` says what has neither."""

    local: dict[str, str] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


def plan_tasks(suite: Suite, data: Path | None, hub: bool, limit: int | None = None) -> TaskPlan:
    """Where each task of a suite finds its questions.

    Args:
        data: folder with local evaluation sets; None when there is none.
        hub: a task without local files may read the hub.
        limit: see `local_data.read_splits`.
    """
    plan = TaskPlan()
    for source in suite.task_files():
        entries = task_settings(source)
        name, dataset = entries["task"], str(entries.get("dataset_name"))
        splits = {
            role: data / pattern.format(dataset_name=dataset)
            for role, pattern in suite.local.items()
            if data is not None
        }
        absent = [file for file in splits.values() if not file.is_file()]
        if splits and not absent:
            where = {key: pattern.format(dataset_name=dataset) for key, pattern in suite.where.items()}
            plan.local[name] = local_task_file(source, splits, {**suite.settings, "task": name}, where, limit)
        elif hub:
            plan.hub[name] = yaml.safe_dump({"include": str(source), "task": name})
        elif absent:
            plan.skipped.append(skipped(name, f"{absent[0]} is missing"))
        else:
            plan.skipped.append(
                skipped(name, "MOR_SHARED_DATA is not set and the hub was not asked for or does not answer")
            )
    return plan


def run_tasks(
    model: HarnessModel, plan: TaskPlan, fewshot: int = 0, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate the tasks of a plan. One that the hub does not give moves to the plan's `skipped`.

    Args:
        fewshot: examples before each question.
        limit: only the first so many documents of each task.

    Returns:
        By task: metrics, stderr (None where there is none), n, split, fewshot and higher_is_better.
    """
    with _quiet(), tempfile.TemporaryDirectory(prefix="mor-tasks-") as folder:
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        for name, text in (plan.local | plan.hub).items():
            (Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")
        # Indexing the harness's thousands of task files would take seven seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        tasks: dict[str, Any] = manager.load(list(plan.local))["tasks"]
        for name in plan.hub:
            try:
                tasks |= manager.load([name])["tasks"]
            except Exception as error:  # the hub's libraries raise whatever their transport does
                reason = str(error).strip().splitlines() or [type(error).__name__]
                plan.skipped.append(skipped(name, f"the hub did not give its data ({reason[0]})"))
        if not tasks:
            return {}
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=fewshot)
            task.set_fewshot_seed(seed=1234)
        results = evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
        return {
            name: {
                **_figures(task, results["samples"][name], results["results"][name], model),
                "split": "test" if task.has_test_docs() else "validation",
                "fewshot": fewshot,
            }
            for name, task in tasks.items()
        }


def summarise(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry for a suite of several tasks: each metric's mean over all questions, tasks weighing by their number."""
    n = sum(task["n"] for task in tasks.values())
    names = set.intersection(*(set(task["metrics"]) for task in tasks.values()))
    first = next(iter(tasks.values()))
    metrics, stderr = {}, {}
    for name in [name for name in first["metrics"] if name in names]:
        metrics[name] = sum(task["metrics"][name] * task["n"] for task in tasks.values()) / n
        errors = [task["stderr"].get(name) for task in tasks.values()]
        known = all(error is not None for error in errors)
        stderr[name] = math.sqrt(sum((e * t["n"]) ** 2 for e, t in zip(errors, tasks.values()))) / n if known else None
    return {**first, "metrics": metrics, "stderr": stderr, "n": n, "tasks": len(tasks)}


def _figures(
    task: Any, samples: Sequence[dict[str, Any]], results: dict[str, Any], model: HarnessModel
) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    documents: dict[str, Any] = {}
    for key, value in results.items():
        name, comma, _filter = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        items = [sample[name] for sample in samples]
        metrics[name] = float(value)
        if all(isinstance(item, (int, float)) for item in items) and math.isclose(
            value, statistics.fmean(items), rel_tol=1e-9
        ):
            stderr[name] = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
        else:
            stderr[name] = jackknife(task.aggregation()[name], items)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        nats, tokens = zip(
            *((sample["resps"][0][0], model.count_tokens(sample["arguments"][0][0])) for sample in samples)
        )
        documents = {"documents": {"nats": [-value for value in nats], "tokens": list(tokens)}}
        metrics["token_perplexity"] = math.exp(-math.fsum(nats) / sum(tokens))
        stderr["token_perplexity"] = jackknife(_token_perplexity, list(zip(nats, tokens)))
    else:
        answers = [answer for sample in samples if (answer := _right_answer(task, sample)) is not None]
        if answers:
            metrics["bits_per_byte"] = _bits_per_byte(answers)
            stderr["bits_per_byte"] = jackknife(_bits_per_byte, answers)
    higher = {name: bool(value) for name, value in task.higher_is_better().items()}
    return {
        "metrics": metrics,
        "stderr": stderr,
        "n": len(samples),
        "higher_is_better": {"bits_per_byte": False, **higher},
        **documents,
    }


def _right_answer(task: Any, sample: dict[str, Any]) -> tuple[float, int] | None:
    """(log-likelihood in nats, UTF-8 bytes) of the right answer; None where there is not exactly one."""
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if task.OUTPUT_TYPE == "loglikelihood":
        gold = 0
    if not isinstance(gold, int) or not 0 <= gold < len(sample["resps"]):
        return None
    return float(sample["resps"][gold][0][0]), len(sample["arguments"][gold][1].encode("utf-8"))


def _bits_per_byte(answers: Sequence[tuple[float, int]]) -> float:
    return -math.fsum(nats for nats, _ in answers) / sum(size for _, size in answers) / math.log(2)


def _token_perplexity(scores: Sequence[tuple[float, int]]) -> float:
    return math.exp(-math.fsum(nats for nats, _ in scores) / sum(tokens for _, tokens in scores))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and `datasets` report every task on standard error; only their errors are worth a person's time."""
    import datasets
    import lm_eval.api.task as harness

    bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bar = harness.tqdm
    datasets.disable_progress_bars()
    harness.tqdm = functools.partial(bar, disable=True)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # F1 of a handful of answers is often undefined, which its value of 0 says already.
            warnings.filterwarnings("ignore", module="sklearn")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        harness.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
