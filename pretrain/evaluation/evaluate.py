"""Evaluate a run or a model in memory: suites in, results out, nothing computed twice.

`evaluate_run` reads a run folder and writes RUN/evaluation/<suite>.json; `evaluate_model` is the same on a model at
hand, for the training loop. Both may be called on every rank of a process group, which then share the work.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import sha256_file
from pretrain.errors import RunError
from pretrain.evaluation import held_out
from pretrain.evaluation.likelihood import Progress, Routing, Scorer, from_rank_zero, rank_and_world
from pretrain.evaluation.lockstep import Lockstep
from pretrain.evaluation.suites import (
    HELD_OUT_SUITES,
    benchmarks,
    check_suites,
    hub_answers,
    shared_evaluation_data,
)
from pretrain.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
TEXT_BYTES = 500_000
SuiteProgress = Callable[[str], Progress | None]
"""Given a suite's name when it begins; returns what is told of its progress."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides an evaluation's numbers, apart from the model and the data.

    Attributes:
        limit: at most so many documents (perplexity) or questions of each task; None takes all.
        routing: see `likelihood.Scorer`; depth: recursion steps every token takes, None lets the routers decide.
        text_bytes: UTF-8 bytes of held-out text that `perplexity` reads; routing analysis reads a fifth of it.
        hub: benchmarks without local files may be read from the Hugging Face hub when it answers.
    """

    limit: int | None = None
    routing: Routing = "causal"
    depth: int | None = None
    text_bytes: int = TEXT_BYTES
    hub: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "text_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"evaluation {name}: must be at least 1, not {value}.")

    @property
    def suffix(self) -> str:
        """Told apart in file names, so that only causal figures at free depth carry a suite's plain name."""
        return (".topk" if self.routing == "topk" else "") + (f".depth-{self.depth}" if self.depth else "")


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
        By suite: {suite, tasks: {name: {metrics, stderr, n, routing, ...}}, skipped: [{task, why, how}], primary,
            seconds}.

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
    """Evaluate a run's final weights and write RUN/evaluation/<suite>.json for each suite.

    A suite whose file is there already, made from the same weights and text with the same settings, is read instead.

    Args:
        data: data set folder whose held-out text is read; by default the recipe's.

    Raises:
        RunError: the run has no weights or tokenizer yet; UserError: as `evaluate_model`; DataError: damaged held-out
            text.
    """
    settings = settings or Settings()
    if limit is not None:
        settings = dataclasses.replace(settings, limit=limit)
    names = check_suites(suites)
    identity = _identity(run, settings)
    documents: Sequence[held_out.Document] = ()
    if any(name in HELD_OUT_SUITES for name in names):
        files = held_out.held_out_files(run, data)
        documents, identity["held_out"] = held_out.read_documents(files, most_text(settings))
    # Rank 0 decides for all: on a network file system the others may see its last results later.
    results = from_rank_zero(
        {name: stored for name in names if (stored := _stored(run, name, settings, identity)) is not None}
    )
    missing = [name for name in names if name not in results]
    if missing:
        from mor_model.weights import load_model

        tokenizer = _tokenizer(run)
        model = load_model(run.weights, device=device)
        for name in missing:
            made = evaluate_model(model, tokenizer, [name], documents=documents, settings=settings, progress=progress)
            results[name] = {**made[name], **_relevant(name, identity), "format_version": FORMAT_VERSION}
            if rank_and_world()[0] == 0:
                if name == "own":
                    _keep_questions(run, documents)
                run.write_json(result_file(run, name, settings), results[name])
    return {name: results[name] for name in names}


def _tokenizer(run: RunFolder) -> Any:
    """The run's tokenizer, which must be the one its plan names: another would score noise without a word."""
    from data_prep.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(run.tokenizer)
    planned = run.plan().get("tokenizer_fingerprint") if run.plan_file.is_file() else None
    if planned and planned != tokenizer.fingerprint:
        raise RunError(
            f"{run.tokenizer}: another tokenizer (fingerprint {tokenizer.fingerprint[:12]}) than the run was trained "
            f"with ({planned[:12]}, plan.json); restore the folder from the data set's tokenizer/."
        )
    return tokenizer


def most_text(settings: Settings) -> int:
    """UTF-8 bytes of held-out text that the suites look at, at most: what `held_out.read_documents` has to keep."""
    from pretrain.evaluation.own_suite import MOST_BYTES

    return max(MOST_BYTES, settings.text_bytes)


def result_file(run: RunFolder, suite: str, settings: Settings) -> Path:
    """Where a suite's result lies."""
    return run.evaluation / f"{suite}{settings.suffix}.json"


def _keep_questions(run: RunFolder, documents: Sequence[held_out.Document]) -> None:
    """The own suite's questions and task files in RUN/evaluation/own, to be read, or run by any
    lm-evaluation-harness.
    """
    from pretrain.evaluation import own_suite
    from pretrain.evaluation.harness import portable_task_file

    folder = run.evaluation / "own"
    for name, file in own_suite.write_questions(folder, _own_questions(documents)).items():
        run.write_text(folder / f"{name}.yaml", portable_task_file(own_suite.task_source(name), {"test": file}))


def _own_questions(documents: Sequence[held_out.Document]) -> dict[str, list[dict[str, Any]]]:
    from pretrain.evaluation import own_suite

    return own_suite.questions(document.text for document in held_out.choose(documents, own_suite.MOST_BYTES))


def _identity(run: RunFolder, settings: Settings) -> dict[str, Any]:
    weights = run.weights / "model.safetensors"
    for path, what in ((weights, "final weights"), (run.tokenizer, "tokenizer")):
        if not path.exists():
            raise RunError(f"{path}: the run has no {what} yet; let it finish (`mor train` on its recipe resumes it).")
    return {
        "weights_digest": sha256_file(weights),
        "settings": {**dataclasses.asdict(settings), "lm_eval": importlib.metadata.version("lm-eval")},
    }


def _relevant(suite: str, identity: dict[str, Any]) -> dict[str, Any]:
    """The part of the identity that can change this suite's numbers."""
    values = dict(identity)
    if suite not in HELD_OUT_SUITES:
        values.pop("held_out", None)
        values["settings"] = {k: v for k, v in values["settings"].items() if k != "text_bytes"}
    return values


def _stored(run: RunFolder, suite: str, settings: Settings, identity: dict[str, Any]) -> dict[str, Any] | None:
    file = result_file(run, suite, settings)
    if not file.is_file():
        return None
    try:
        stored = run.read_json(file)
    except RunError:
        return None  # written by hand or damaged: evaluating again replaces it
    wanted = {**_relevant(suite, identity), "format_version": FORMAT_VERSION}
    if any(stored.get(key) != value for key, value in wanted.items()):
        return None
    if stored["skipped"] and suite in benchmarks():
        from pretrain.evaluation.harness import plan_tasks

        plan = plan_tasks(benchmarks()[suite], shared_evaluation_data(), settings.hub and hub_answers())
        if plan.skipped != stored["skipped"]:
            return None
    return stored


def _perplexity(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation.perplexity import evaluate_perplexity

    chosen = held_out.choose(documents, settings.text_bytes)[: settings.limit]
    if not chosen:
        return _without_text(suite)
    return _single(suite, evaluate_perplexity(scorer, tokenizer, chosen), "bits_per_byte")


def _routing(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    from pretrain.evaluation.routing import evaluate_routing

    chosen = held_out.choose(documents, max(1, settings.text_bytes // 5))
    if not chosen:
        return _without_text(suite)
    task = evaluate_routing(scorer, tokenizer, [document.text for document in chosen])
    task["routing"] = "causal and topk" if task["routed"] else "causal"
    return _single(suite, task, "loss_causal")


def _own(suite: str, scorer: Scorer, tokenizer: Any, documents: Any, settings: Settings) -> dict[str, Any]:
    import tempfile

    from pretrain.evaluation import own_suite
    from pretrain.evaluation.harness import TaskPlan, local_task_file, run_tasks, summarise
    from pretrain.evaluation.lm_adapter import HarnessModel

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
    from pretrain.evaluation.harness import plan_tasks, run_tasks, summarise

    row = benchmarks()[suite]
    hub = settings.hub and hub_answers()
    plan = plan_tasks(row, shared_evaluation_data(), hub, settings.limit)
    tasks: dict[str, Any] = {}
    if plan.local or plan.hub:
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
        "value": task["metrics"][metric],
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
