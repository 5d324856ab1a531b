"""Evaluate a run or a model in memory: suites in, results out, nothing computed twice.

`evaluate_run` reads a run folder and writes RUN/evaluation/<suite>.json; `evaluate_model` is the same on a model at
hand, for the training loop. Both may be called on every rank of a process group, which then share the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from pretrain.errors import RunError, UserError
from pretrain.evaluation import held_out
from pretrain.evaluation.identity import identity, run_tokenizer, signed, stored_result
from pretrain.evaluation.likelihood import Progress, Scorer, from_rank_zero, rank_and_world
from pretrain.evaluation.settings import Settings, result_file
from pretrain.evaluation.suites import (
    HELD_OUT_SUITES,
    benchmarks,
    check_suites,
    hub_answers,
    shared_evaluation_data,
)
from pretrain.ranks.lockstep import Lockstep
from pretrain.records.run_folder import RunFolder, require_writable

if TYPE_CHECKING:
    import torch

SuiteProgress = Callable[[str], Progress | None]
"""Given a suite's name when it begins; returns what is told of its progress."""


class Incomplete(RunError):
    """A suite could not be evaluated, or a result not written. Attributes: results: by suite, those there are."""

    def __init__(self, message: str, results: dict[str, dict[str, Any]]) -> None:
        super().__init__(message)
        self.results = results


def evaluate_model(
    model: Any,
    tokenizer: Any,
    suites: Sequence[str],
    limit: int | None = None,
    *,
    documents: Sequence[held_out.Document] = (),
    settings: Settings | None = None,
    device: torch.device | None = None,
    progress: SuiteProgress | None = None,
    lockstep: Lockstep | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in memory; call it on every rank (under ZeRO-3 each forward pass is a collective).

    Args:
        model: a `RecursiveTransformer` (of a DeepSpeed engine: `engine.module`); its mode is restored afterwards.
        tokenizer: `data_prep.tokenizers.load_tokenizer`'s.
        limit: overrides that of `settings`.
        documents: held-out documents, which `perplexity`, `own` and `routing` need (`held_out.read_documents`).
        device: where the network computes; by default where its parameters are, which offloading makes another place.
        lockstep: lets the ranks break off together; None never does.

    Returns:
        By suite: {suite, tasks: {name: {metrics, stderr, n, not_finite, routing, ...}}, skipped: [{task, why, how}],
            primary, seconds}. A number that is not finite is None.

    Raises:
        UserError: an unknown suite, routing or depth.
    """
    settings = settings or Settings()
    if limit is not None:
        settings = dataclasses.replace(settings, limit=limit)
    scorer = Scorer(
        model,
        tokenizer.eod_id,
        routing=settings.routing,
        depth=settings.depth,
        device=device,
        lockstep=lockstep or Lockstep(),
    )
    results = {}
    for suite in check_suites(suites):
        scorer.progress = progress(suite) if progress else None
        began = time.monotonic()
        result = _SUITES.get(suite, _benchmark)(suite, scorer, tokenizer, documents, settings)
        for task in result["tasks"].values():
            task.setdefault("routing", settings.routing)
            task.setdefault("depth", settings.depth)
        results[suite] = {"suite": suite, **_finite(result), "seconds": round(time.monotonic() - began, 3)}
    return results


def evaluate_run(
    run: RunFolder,
    suites: Sequence[str],
    limit: int | None = None,
    device: str = "cpu",
    *,
    settings: Settings | None = None,
    data: Path | None = None,
    progress: SuiteProgress | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run's final weights and write RUN/evaluation/<suite>.json for each suite, as soon as it is there.

    A suite whose file holds what evaluating now would give (`identity.stored_result`) is read instead.

    Args:
        data: data set folder whose held-out text is read; by default the recipe's.

    Raises:
        Incomplete: after everything that could be done, when a suite cannot be evaluated (no weights, no held-out text,
            damaged questions, ...), or on rank 0 when a result could not be written. RunError: the run's folder cannot
            be written. UserError, DataError: on several ranks, what only evaluating a suite shows.
    """
    settings = settings or Settings()
    if limit is not None:
        settings = dataclasses.replace(settings, limit=limit)
    names = check_suites(suites)
    made_of: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, list[str]] = {}
    if rank_and_world()[0] == 0:
        for name in names:
            try:
                made_of[name] = identity(run, name, settings, data)
                if stored := stored_result(run, name, settings, data, made_of[name]):
                    results[name] = stored
            except (DataError, UserError) as error:
                left_out.setdefault(str(error), []).append(name)
    # Rank 0 decides for all: on a network file system the others may see its last results later.
    made_of, results, left_out = from_rank_zero((made_of, results, left_out))
    not_written = []
    missing = [name for name in made_of if name not in results]
    if missing:
        require_writable_for_all(run.evaluation)
        from mor_model.weights import load_model

        documents: Sequence[held_out.Document] = ()
        if any(name in HELD_OUT_SUITES for name in missing):
            documents, _ = held_out.read_documents(held_out.held_out_files(run, data), most_text(settings))
        tokenizer = run_tokenizer(run)
        model = load_model(run.weights, device=device)
        for name in missing:
            try:
                with _scratch_space():
                    made = evaluate_model(
                        model, tokenizer, [name], documents=documents, settings=settings, progress=progress
                    )
            except (DataError, UserError) as error:
                if rank_and_world()[1] > 1:
                    raise  # the others may wait for this rank in a forward pass
                left_out.setdefault(str(error), []).append(name)
                continue
            results[name] = signed(made[name], made_of[name])
            if rank_and_world()[0] == 0:
                file = result_file(run, name, settings)
                try:
                    if name == "own":
                        _keep_questions(run, documents)
                    run.write_json(file, results[name])
                except OSError as error:
                    not_written.append(
                        f"{file}: not written ({error.strerror or error}); make room and evaluate again to keep it."
                    )
    results = {name: results[name] for name in names if name in results}
    problems = [f"{', '.join(suites)} not evaluated: {problem}" for problem, suites in left_out.items()]
    if problems or not_written:
        raise Incomplete(" ".join(problems + not_written), results)
    return results


def require_writable_for_all(folder: Path) -> None:
    """`run_folder.require_writable`, found out by rank 0 for all. Collective."""
    problem = None
    if rank_and_world()[0] == 0:
        try:
            require_writable(folder)
        except RunError as error:
            problem = str(error)
    if problem := from_rank_zero(problem):
        raise RunError(problem)


@contextlib.contextmanager
def _scratch_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # questions and task files are written to the temporary folder
        raise RunError(
            f"a file cannot be read or written ({error}); see that {tempfile.gettempdir()} has room, or let TMPDIR "
            "name another folder."
        ) from None


def most_text(settings: Settings) -> int:
    """UTF-8 bytes of held-out text that the suites look at, at most: what `held_out.read_documents` has to keep."""
    from pretrain.evaluation.own_suite import MOST_BYTES

    return max(MOST_BYTES, settings.text_bytes)


def _keep_questions(run: RunFolder, documents: Sequence[held_out.Document]) -> None:
    """The own suite's questions and task files in RUN/evaluation/own, to be read, or run by any
    lm-evaluation-harness.
    """
    from pretrain.evaluation import own_suite
    from pretrain.evaluation.task_files import portable_task_file

    folder = run.evaluation / "own"
    for name, file in own_suite.write_questions(folder, _own_questions(documents)).items():
        run.write_text(folder / f"{name}.yaml", portable_task_file(own_suite.task_source(name), {"test": file}))


def _own_questions(documents: Sequence[held_out.Document]) -> dict[str, list[dict[str, Any]]]:
    from pretrain.evaluation import own_suite

    return own_suite.questions(document.text for document in held_out.choose(documents, own_suite.MOST_BYTES))


def _perplexity(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation.perplexity import evaluate_perplexity

    chosen = held_out.choose(documents, settings.text_bytes)[: settings.limit]
    if not chosen:
        return _without_text(suite)
    return _single(suite, evaluate_perplexity(scorer, tokenizer, chosen), "bits_per_byte")


def _routing(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation.routing_analysis import evaluate_routing

    chosen = held_out.choose(documents, max(1, settings.text_bytes // 5))
    if not chosen:
        return _without_text(suite)
    task = evaluate_routing(scorer, tokenizer, [document.text for document in chosen])
    task["routing"] = "causal and topk" if task["routed"] else "causal"
    return _single(suite, task, "loss_causal")


def _own(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation import own_suite
    from pretrain.evaluation.harness import run_tasks, summarise
    from pretrain.evaluation.lm_adapter import HarnessModel
    from pretrain.evaluation.task_files import TaskPlan, local_task_file

    if not documents:
        return _without_text(suite)
    made = _own_questions(documents)
    missing = [
        {
            "task": name,
            "why": "the held-out text has too little prose for it",
            "how": "prepare the data set with a larger test share.",
        }
        for name, records in made.items()
        if not records
    ]
    with tempfile.TemporaryDirectory(prefix="mor-own-") as folder:
        files = own_suite.write_questions(Path(folder), made)
        plan = TaskPlan(
            {
                name: local_task_file(own_suite.task_source(name), {"test": file}, {"task": name})
                for name, file in files.items()
            }
        )
        tasks = run_tasks(HarnessModel(scorer, tokenizer), plan, limit=settings.limit)
    for name, task in tasks.items():
        task["chance"] = own_suite.CHANCE[name]
    if not tasks:
        return {"tasks": {}, "skipped": missing, "primary": None}
    tasks = {suite: summarise(tasks), **tasks}
    tasks[suite]["chance"] = sum(t["chance"] * t["n"] for n, t in tasks.items() if n != suite) / tasks[suite]["n"]
    return {"tasks": tasks, "skipped": missing, "primary": primary(suite, tasks[suite], "acc")}


def _benchmark(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation.task_files import plan_tasks

    row = benchmarks()[suite]
    hub = settings.hub and hub_answers()
    plan = plan_tasks(row, shared_evaluation_data(), hub, settings.limit)
    tasks: dict[str, Any] = {}
    if plan.local or plan.hub:
        from pretrain.evaluation.harness import run_tasks, summarise
        from pretrain.evaluation.lm_adapter import HarnessModel

        tasks = run_tasks(HarnessModel(scorer, tokenizer), plan, fewshot=row.fewshot, limit=settings.limit)
    for task in tasks.values():
        task["chance"] = row.chance
    if not tasks:
        return {"tasks": {}, "skipped": plan.skipped, "primary": None}
    if len(tasks) == 1:
        ((name, task),) = tasks.items()
        tasks = {suite: {**task, "harness_task": name}}
    else:
        tasks = {suite: summarise(tasks), **tasks}
    return {"tasks": tasks, "skipped": plan.skipped, "primary": primary(suite, tasks[suite], row.metric)}


def primary(name: str, task: dict[str, Any], metric: str) -> dict[str, Any]:
    """The one figure that stands for a suite in a table."""
    higher = task.get("higher_is_better", {}).get(metric, False)
    return {
        "task": name,
        "metric": metric,
        "value": task["metrics"].get(metric),
        "stderr": task["stderr"].get(metric),
        "n": task["n"],
        "chance": task.get("chance"),
        "higher_is_better": higher,
    }


def _single(name: str, task: dict[str, Any], metric: str) -> dict[str, Any]:
    return {"tasks": {name: task}, "skipped": [], "primary": primary(name, task, metric)}


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_text(suite: str) -> dict[str, Any]:
    entry = {
        "task": suite,
        "why": "there is no held-out text, or none within --text-bytes",
        "how": "prepare the data set with a test split, or allow more bytes.",
    }
    return {"tasks": {}, "skipped": [entry], "primary": None}


_SUITES: dict[str, Callable[..., dict[str, Any]]] = {"perplexity": _perplexity, "routing": _routing, "own": _own}
