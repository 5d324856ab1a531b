"""Whether a stored result still holds: one rule for `mor eval`, `mor compare` and Slurm jobs.

RUN/evaluation/<suite>.json carries its `identity`: weights, network, tokenizer, text or questions, settings and the
versions of what computed it. A result is read again only if evaluating now would have the same identity, and if the
file holds what was written (`checksum`). Nothing here loads a network, so asking is cheap.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.json_input import read_json
from data_prep.tokenizers.base import Tokenizer
from data_prep.tokenizers.loading import load_tokenizer
from pretrain.errors import RunError, UserError
from pretrain.evaluation import held_out
from pretrain.evaluation.settings import HELD_OUT_SUITES, Settings, result_file
from pretrain.evaluation.suites import benchmarks, harness_tasks, hub_answers, shared_evaluation_data
from pretrain.evaluation.task_files import plan_tasks
from pretrain.records.run_folder import RunFolder

FORMAT_VERSION = 2
_ROOT = Path(__file__).resolve().parents[2]
# Settings that change a suite's numbers; a benchmark's are those of `own`.
_SETTINGS = {
    "perplexity": ("limit", "routing", "depth", "text_bytes"),
    "routing": ("routing", "depth", "text_bytes"),
    "own": ("limit", "routing", "depth"),
}
# Sources and packages that compute them.
_SOURCES = ("mor_model/*.py", "data_prep/tokenizers/*.py", "pretrain/evaluation/*.py", "pretrain/evaluation/tasks/**/*")
_PACKAGES = ("mor-pretrain", "torch", "numpy", "tokenizers", "sentencepiece")


def identity(run: RunFolder, suite: str, settings: Settings, data: Path | None = None) -> dict[str, Any]:
    """What the suite's result would be made of now.

    Args:
        data: data set folder whose held-out text is read; by default the recipe's.

    Returns:
        {format_version, suite, settings, weights, model, tokenizer, held_out, questions, versions}: digests are
        SHA-256; `held_out` (suites that read the run's text) is that of all its documents in any order;
        `questions` (benchmarks) has each task's files as one digest, or "hub", for the tasks within reach.

    Raises:
        RunError: the run has no weights, tokenizer or held-out text. DataError: damaged held-out text or tokenizer.
        UserError: lm-eval or the shared evaluation sets are not where they should be.
    """
    weights = run.weights / "model.safetensors"
    for path, what in ((weights, "final weights"), (run.tokenizer, "tokenizer")):
        if not path.exists():
            raise RunError(f"{path}: the run has no {what} yet; let it finish (`mor train` on its recipe resumes it).")
    tokenizer = run_tokenizer(run)
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in _PACKAGES}
    chosen = {name: getattr(settings, name) for name in _SETTINGS.get(suite, _SETTINGS["own"])}
    parts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "suite": suite,
        "settings": chosen,
        "weights": _digest(weights),
        "model": _digest(run.weights / "model.json"),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "end_of_document": tokenizer.eod_id},
        "versions": {**versions, "code": _code()},
    }
    if suite in HELD_OUT_SUITES:
        parts["held_out"] = _text_digest(tuple(map(_state, held_out.held_out_files(run, data))))
    else:
        row = benchmarks()[suite]
        plan = plan_tasks(row, shared_evaluation_data(), settings.hub and hub_answers())
        local = {name: _text_sha256(" ".join(map(_digest, files))) for name, files in plan.files.items()}
        parts["questions"] = {**local, **dict.fromkeys(plan.hub, "hub")}
        parts["settings"]["fewshot"] = row.fewshot
    if suite not in ("perplexity", "routing"):
        harness_tasks()  # refuses a machine without it
        parts["versions"]["lm-eval"] = importlib.metadata.version("lm-eval")
    return parts


def run_tokenizer(run: RunFolder) -> Tokenizer:
    """The run's tokenizer. It must be the one that the plan names: with another one, the figures would be noise.

    Raises:
        RunError: another one. DataError: none that can be read.
    """
    tokenizer = load_tokenizer(run.tokenizer)
    planned = run.plan().get("tokenizer_fingerprint") if run.plan_file.is_file() else None
    if planned and planned != tokenizer.fingerprint:
        raise RunError(
            f"{run.tokenizer}: another tokenizer (fingerprint {tokenizer.fingerprint[:12]}) than the run was trained "
            f"with ({str(planned)[:12]}, plan.json); restore the folder from the data set's tokenizer/."
        )
    return tokenizer


def signed(result: dict[str, Any], made_of: dict[str, Any]) -> dict[str, Any]:
    """A result as it is stored: with its `identity`, whose questions are those that were asked, and its `checksum`."""
    if "questions" in made_of:
        left_out = {entry["task"] for entry in result["skipped"]}
        asked = {name: source for name, source in made_of["questions"].items() if name not in left_out}
        made_of = {**made_of, "questions": asked}
    content = json.loads(json.dumps({**result, "identity": made_of}))
    return {**content, "checksum": _checksum(content)}


def stored_result(
    run: RunFolder, suite: str, settings: Settings, data: Path | None = None, made_of: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The suite's result in the run folder, if it is what evaluating now would give; None where it has to be made.

    Args:
        made_of: the `identity` of now, where the caller has it.

    Raises:
        RunError, DataError: as `identity`.
    """
    try:
        stored = read_json(result_file(run, suite, settings))
        then, checksum = stored["identity"], stored.pop("checksum")
        asked = then.get("questions", {})
        if checksum != _checksum(stored):
            return None
    except (FileNotFoundError, DataError, TypeError, KeyError, AttributeError):
        return None  # damaged: evaluating again replaces it
    now = made_of or identity(run, suite, settings, data)
    # Questions that are out of reach now do not invalidate a result that was made of them.
    if not now.get("questions", {}).items() <= asked.items():
        return None
    return {**stored, "checksum": checksum} if {**now, "questions": asked} == {**then, "questions": asked} else None


def is_current(run: RunFolder, suite: str, settings: Settings) -> bool:
    """Whether the run folder has the result that evaluating now would give. False also where `identity` raises: then
    `mor eval` says what is wrong.
    """
    try:
        return stored_result(run, suite, settings) is not None
    except (UserError, DataError):
        return False


def _checksum(content: dict[str, Any]) -> str:
    return _text_sha256(json.dumps(content, sort_keys=True))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _SOURCES for file in _ROOT.glob(pattern) if file.is_file()}):
        digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    try:
        return _digest_of(*_state(file))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); restore it.") from None


State = tuple[Path, int, int]
"""A file, when it was last changed (ns) and its size. While these stay, so does what was computed from it."""


def _state(file: Path) -> State:
    found = file.stat()
    return file, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)
def _digest_of(file: Path, changed_ns: int, size: int) -> str:
    return sha256_file(file)


@functools.lru_cache(maxsize=64)
def _text_digest(states: tuple[State, ...]) -> str:
    return held_out.read_documents([file for file, _, _ in states], 1)[1]
