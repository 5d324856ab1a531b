"""Evaluate a run or a model in memory.

`evaluate_run` reads a run folder and writes RUN/evaluation/<suite>.json; `evaluate_model` evaluates a model in memory,
for the training loop. Called on every rank of a process group, both share the work out.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from pretrain.errors import RunError, UserError
from pretrain.evaluation import held_out, own_suite
from pretrain.evaluation.evaluation_ranks import rank_and_world
from pretrain.evaluation.identity import identity, run_tokenizer, signed, stored_result
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.perplexity import evaluate_perplexity
from pretrain.evaluation.routing_analysis import evaluate_routing
from pretrain.evaluation.settings import HELD_OUT_SUITES, Settings, result_file
from pretrain.evaluation.suites import benchmarks, check_suites, hub_answers, shared_evaluation_data
from pretrain.evaluation.task_files import TaskPlan, local_task_file, plan_tasks, portable_task_file
from pretrain.ranks.agreement import on_first_rank
from pretrain.ranks.lockstep import Lockstep
from pretrain.records.run_folder import RunFolder, require_writable

if TYPE_CHECKING:
    import torch


class Incomplete(RunError):
    """A suite could not be evaluated, or a result not written; `results` has those that were made, by suite."""

    def __init__(self, message: str, results: dict[str, dict[str, Any]]) -> None:
        super().__init__(message)
        self.results = results


def evaluate_model(
    model: Any,
    tokenizer: Any,
    suites: Sequence[str],
    *,
    documents: Sequence[held_out.Document] = (),
    settings: Settings | None = None,
    device: torch.device | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    lockstep: Lockstep | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in memory; call it on every rank (under ZeRO-3 each forward pass is a collective).

    Args:
        model: a `RecursiveTransformer` (of a DeepSpeed engine: `engine.module`); its mode is restored afterwards.
        tokenizer: `data_prep.tokenizers.load_tokenizer`'s.
        documents: held-out documents, which `perplexity`, `own` and `routing` need (`held_out.read_documents`).
        device: where the network computes; by default where its parameters are. With offloading these differ.
        progress: told the suite's name, the number of batches done, and of all batches.
        lockstep: lets the ranks break off together; None never does.

    Returns:
        By suite: {suite, tasks: {name: {metrics, stderr, n, not_finite, routing, ...}}, skipped: [{task, why, how}],
            primary, seconds}. A number that is not finite is None.

    Raises:
        UserError: an unknown suite, routing or depth.
    """
    settings = settings or Settings()
    scorer = Scorer(
        model, tokenizer.eod_id, settings.routing, settings.depth, device=device, lockstep=lockstep or Lockstep()
    )
    results = {}
    for suite in check_suites(suites):
        scorer.progress = functools.partial(progress, suite) if progress else None
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
    device: str = "cpu",
    *,
    settings: Settings | None = None,
    data: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run's final weights and write RUN/evaluation/<suite>.json for each suite as soon as it is there.

    A suite whose file holds what evaluating now would give (`identity.stored_result`) is read instead.

    Args:
        data: data set folder whose held-out text is read; by default the recipe's.

    Raises:
        Incomplete: after everything that could be done, when a suite cannot be evaluated (no weights, no held-out text,
            damaged questions, ...), or on rank 0 when a result could not be written. RunError: the run's folder cannot
            be written, or, on several ranks, a suite fails that looked sound.
    """
    settings, names = settings or Settings(), check_suites(suites)
    # Rank 0 decides for all: on a network file system the others may see its last results later.
    results, made_of, problems = on_first_rank(lambda: _stored(run, names, settings, data))
    not_written = []
    rank, world = rank_and_world()
    if made_of:
        on_first_rank(lambda: require_writable(run.evaluation))
        from mor_model.weights import load_model

        documents: Sequence[held_out.Document] = ()
        if any(name in HELD_OUT_SUITES for name in made_of):
            documents, _ = held_out.read_documents(held_out.held_out_files(run, data), most_text(settings))
        tokenizer = run_tokenizer(run)
        model = load_model(run.weights, device=device)
        for name in made_of:
            try:
                made = evaluate_model(
                    model, tokenizer, [name], documents=documents, settings=settings, progress=progress
                )
            except (DataError, UserError, OSError) as error:
                problem = str(error)
                if isinstance(error, OSError):  # questions and task files are written to the temporary folder
                    problem = (
                        f"a file cannot be read or written ({error}); see that {tempfile.gettempdir()} has room, or "
                        "let TMPDIR name another folder."
                    )
                if world > 1:
                    raise RunError(problem) from None  # the others may wait for this rank in a forward pass
                problems.setdefault(problem, []).append(name)
                continue
            results[name] = signed(made[name], made_of[name])
            if rank == 0:
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
    told = [f"{', '.join(suites)} not evaluated: {problem}" for problem, suites in problems.items()] + not_written
    if told:
        raise Incomplete(" ".join(told), results)
    return results


def _stored(
    run: RunFolder, suites: Sequence[str], settings: Settings, data: Path | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[str]]]:
    """By suite: results that still hold, and the identities of those to be made; and suites by what is wrong."""
    results: dict[str, Any] = {}
    made_of: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    for suite in suites:
        try:
            now = identity(run, suite, settings, data)
            if stored := stored_result(run, suite, settings, data, now):
                results[suite] = stored
            else:
                made_of[suite] = now
        except (DataError, UserError) as error:
            problems.setdefault(str(error), []).append(suite)
    return results, made_of, problems


def most_text(settings: Settings) -> int:
    """UTF-8 bytes of held-out text that the suites look at, at most: what `held_out.read_documents` has to keep."""
    return max(own_suite.MOST_BYTES, settings.text_bytes)


def _keep_questions(run: RunFolder, documents: Sequence[held_out.Document]) -> None:
    """Write the own suite's questions and tasks to RUN/evaluation/own; any lm-evaluation-harness can run them."""
    folder = run.evaluation / "own"
    for name, file in own_suite.write_questions(folder, _own_questions(documents)).items():
        run.write_text(
            folder / f"{name}.yaml", portable_task_file(own_suite.TASK_FILES / f"{name}.yaml", {"test": file})
        )


def _own_questions(documents: Sequence[held_out.Document]) -> dict[str, list[dict[str, Any]]]:
    return own_suite.questions(document.text for document in held_out.choose(documents, own_suite.MOST_BYTES))


def _perplexity(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    chosen = held_out.choose(documents, settings.text_bytes)[: settings.limit]
    if not chosen:
        return _without_text(suite)
    return _result(suite, {suite: evaluate_perplexity(scorer, tokenizer, chosen)}, "bits_per_byte")


def _routing(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    chosen = held_out.choose(documents, max(1, settings.text_bytes // 5))
    if not chosen:
        return _without_text(suite)
    task = evaluate_routing(scorer, tokenizer, [document.text for document in chosen])
    task["routing"] = "causal and topk" if task["routed"] else "causal"
    return _result(suite, {suite: task}, "loss_causal")


def _own(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    if not documents:
        return _without_text(suite)
    made = _own_questions(documents)
    with tempfile.TemporaryDirectory(prefix="mor-own-") as folder:
        plan = TaskPlan()
        for name, file in own_suite.write_questions(Path(folder), made).items():
            source = own_suite.TASK_FILES / f"{name}.yaml"
            plan.local[name] = local_task_file(source, {"test": file}, {"task": name})
        tasks = _ask(scorer, tokenizer, plan, own_suite.CHANCE, limit=settings.limit)
    if tasks:
        chance = sum(task["chance"] * task["n"] for task in tasks.values()) / sum(task["n"] for task in tasks.values())
        tasks = {suite: {**summarise(tasks), "chance": chance}, **tasks}
    why, how = "the held-out text has too little prose for it", "prepare the data set with a larger test share."
    missing = [{"task": name, "why": why, "how": how} for name, records in made.items() if not records]
    return _result(suite, tasks, "acc", missing)


def _benchmark(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    row = benchmarks()[suite]
    plan = plan_tasks(row, shared_evaluation_data(), settings.hub and hub_answers(), settings.limit)
    tasks = _ask(scorer, tokenizer, plan, defaultdict(lambda: row.chance), fewshot=row.fewshot, limit=settings.limit)
    if len(tasks) == 1:
        ((name, task),) = tasks.items()
        tasks = {suite: {**task, "harness_task": name}}
    elif tasks:
        tasks = {suite: summarise(tasks), **tasks}
    return _result(suite, tasks, row.metric, plan.skipped)


def _ask(
    scorer: Scorer, tokenizer: Any, plan: TaskPlan, chance: Mapping[str, float | None], **options: Any
) -> dict[str, dict[str, Any]]:
    """`harness.run_tasks`, and what chance gives in each task."""
    if not (plan.local or plan.hub):
        return {}
    # The harness takes seconds to import.
    from pretrain.evaluation.harness import run_tasks
    from pretrain.evaluation.lm_adapter import HarnessModel

    tasks = run_tasks(HarnessModel(scorer, tokenizer), plan, **options)
    return {name: {**task, "chance": chance[name]} for name, task in tasks.items()}


def summarise(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry for a suite of several tasks: each metric's mean over all questions, tasks weighing by their number."""
    n = sum(task["n"] for task in tasks.values())
    first = next(iter(tasks.values()))
    metrics, stderr = {}, {}
    for name in [name for name in first["metrics"] if all(name in task["metrics"] for task in tasks.values())]:
        metrics[name] = sum(task["metrics"][name] * task["n"] for task in tasks.values()) / n
        errors = [task["stderr"].get(name) for task in tasks.values()]
        known = all(error is not None for error in errors)
        stderr[name] = math.sqrt(sum((e * t["n"]) ** 2 for e, t in zip(errors, tasks.values()))) / n if known else None
    totals = {
        name: sum(task[name] for task in tasks.values())
        for name in ("not_finite", "lost_bytes", "prompts_cut", "scored_bytes", "text_bytes")
    }
    text = hashlib.sha256("".join(task["text_sha256"] for task in tasks.values()).encode()).hexdigest()
    summary = {"metrics": metrics, "stderr": stderr, "n": n, "text_sha256": text, "tasks": len(tasks)}
    return {**first, **totals, **summary}


def _result(
    suite: str, tasks: dict[str, dict[str, Any]], metric: str, skipped: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """A suite's result; `primary` is the one figure that stands for it in a table, None without tasks."""
    primary = None
    if tasks:
        task = tasks[suite]
        primary = {
            "task": suite,
            "metric": metric,
            "value": task["metrics"].get(metric),
            "stderr": task["stderr"].get(metric),
            "n": task["n"],
            "chance": task.get("chance"),
            "higher_is_better": task.get("higher_is_better", {}).get(metric, False),
        }
    return {"tasks": tasks, "skipped": list(skipped), "primary": primary}


def _without_text(suite: str) -> dict[str, Any]:
    why = "there is no held-out text, or none within --text-bytes"
    how = "prepare the data set with a test split, or allow more bytes."
    return _result(suite, {}, "", [{"task": suite, "why": why, "how": how}])


def _finite(value: Any) -> Any:
    """`value` with None for every number that is not finite; JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SUITES: dict[str, Callable[..., dict[str, Any]]] = {"perplexity": _perplexity, "routing": _routing, "own": _own}
