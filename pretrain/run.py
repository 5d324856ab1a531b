"""One run from start to end: check, join the other ranks, build, resume, train, export.

`prepare` does everything that can go wrong for a reason a person can mend, before any process group starts.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_model.config import ModelConfig
from pretrain.data import OpenedData, open_data
from pretrain.ds_config import offload_device, resolve_ds_config, zero_stage
from pretrain.environment import Ranks
from pretrain.errors import RunError, UserError
from pretrain.plan import Plan, make_plan
from pretrain.recipe import Recipe, load_recipe
from pretrain.run_folder import RunFolder
from pretrain.signals import EXIT_FINISHED, StopRequest
from pretrain.watchdog import Watchdog

# What may differ between the starts of one run without making it another run.
_FREE = (
    "run_dir",
    "logging",
    "checkpoint",
    "evaluation",
    "faults",
    "limits",
    "compile",
    "checkpointing",
    "deepspeed",
    "data.path",
    "data.verify",
    "data.skip_samples",
    "batch.micro_batch",
)


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other rank."""

    recipe: Recipe
    config: ModelConfig
    plan: Plan
    ds_config: dict[str, Any]
    data: OpenedData
    folder: RunFolder

    @property
    def shape(self) -> dict[str, Any]:
        """What a checkpoint must agree with beside the world size."""
        return {
            "zero_stage": zero_stage(self.ds_config),
            "precision": self.recipe.precision,
            "optimizer": self.recipe.optim.name,
        }


def prepare(recipe: Recipe, ranks: Ranks) -> Prepared:
    """Resolve and check a recipe for so many ranks.

    Raises:
        RecipeError, DataError, RunError: one sentence on what to change.
    """
    from pretrain.engine import resolve_precision

    recipe = recipe.model_copy(update={"precision": resolve_precision(recipe.precision)})
    config = recipe.network()
    plan = make_plan(recipe)
    ds_config = resolve_ds_config(recipe, ranks.world_size)
    data = open_data(recipe, config, plan)
    folder = RunFolder(recipe.run_folder)
    prepared = Prepared(recipe, config, plan, ds_config, data, folder)
    _check_folder(prepared)
    return prepared


def is_finished(prepared: Prepared) -> bool:
    """True when this very run has already come to its end."""
    return prepared.folder.status().get("state") == "finished"


def execute(prepared: Prepared, ranks: Ranks) -> int:
    """Train (or go on training) a prepared run; returns the exit code. Collective over all ranks."""
    import deepspeed
    import torch

    from pretrain.agreement import require_agreement
    from pretrain.engine import start_process_group

    recipe, folder, first = prepared.recipe, prepared.folder, ranks.rank == 0
    wall_clock = recipe.limits.wall_clock_hours
    with StopRequest(
        folder.path, watch_files=first, wall_clock=None if wall_clock is None else wall_clock * 3600
    ) as stop:
        device = start_process_group(ranks, recipe.limits.stall_seconds)
        try:
            require_agreement(_identity(prepared))
            if first:
                _write_folder(prepared, ranks, device)
            torch.distributed.barrier()
            with Watchdog(folder.path / "stacks", ranks, recipe.limits.stall_seconds) as watchdog:
                return _train(prepared, ranks, device, stop, watchdog)
        except UserError as error:
            if first and folder.path.is_dir():
                folder.write_json(folder.status_file, {"state": "failed", "reason": str(error)})
            raise
        finally:
            if torch.distributed.is_initialized():
                deepspeed.comm.destroy_process_group()


def _train(prepared: Prepared, ranks: Ranks, device: Any, stop: StopRequest, watchdog: Watchdog) -> int:
    from pretrain.batches import BatchReader
    from pretrain.checkpoint import CheckpointStore, TrainState
    from pretrain.engine import build_engine, peak_flops
    from pretrain.export import export_weights
    from pretrain.loop import Trainer
    from pretrain.telemetry import Telemetry, rewind_metrics
    from pretrain.validation import Validator

    recipe, config, plan, data, folder = (
        prepared.recipe,
        prepared.config,
        prepared.plan,
        prepared.data,
        prepared.folder,
    )
    first = ranks.rank == 0
    engine = build_engine(recipe, config, prepared.ds_config)
    store = CheckpointStore(
        folder.checkpoints,
        engine,
        recipe.checkpoint,
        keep_every=plan.keep_every,
        pinned=frozenset(branch.start for branch in plan.branches),
        describe={"world_size": ranks.world_size, **prepared.shape},
    )
    warnings: list[str] = []
    state = store.resume(warnings.append) or TrainState()
    state.skipped = merge_ranges(state.skipped, recipe.data.skip_samples)
    if first:
        rewind_metrics(folder, state.step)
    telemetry = Telemetry(folder, recipe, plan.steps, active=first)
    for warning in warnings:
        telemetry.say(warning)
        telemetry.event("warning", state.step, text=warning)
    if first:
        telemetry.event("started", state.step, world_size=ranks.world_size, launcher=ranks.launcher)
        telemetry.say(_headline(prepared, ranks, state.step))
        folder.write_json(folder.status_file, {"state": "running", "step": state.step, "steps": plan.steps})
    end_of_document = data.end_of_document if config.document_masking else None
    reader = BatchReader(
        data.source,
        micro_batch=recipe.batch.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        end_of_document=end_of_document,
    )
    validator = Validator(
        engine,
        data.validation,
        length=plan.sequence_length,
        micro_batch=recipe.batch.micro_batch,
        routed=config.router is not None,
        end_of_document=end_of_document,
        device=device,
    )
    trainer = Trainer(
        recipe=recipe,
        config=config,
        plan=plan,
        ranks=ranks,
        device=device,
        engine=engine,
        reader=reader,
        source=data.source,
        validator=validator,
        store=store,
        telemetry=telemetry,
        stop=stop,
        watchdog=watchdog,
        peak_flops=peak_flops(device),
    )
    try:
        outcome = trainer.train(state)
        if outcome.state == "finished":
            export_weights(engine, config, folder.weights)
            telemetry.event("finished", state.step, flops=state.flops, tokens=state.tokens)
        if first:
            folder.write_json(folder.status_file, {"state": outcome.state, "step": state.step, "steps": plan.steps})
        telemetry.say(_closing(prepared, outcome.state, state.step, stop.reason))
        return EXIT_FINISHED if outcome.state == "finished" else outcome.request.exit_code
    finally:
        reader.close()
        store.close()
        telemetry.close()


def merge_ranges(*groups: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Ascending, disjoint ranges [first, last] that cover what any of the groups covers."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(range_ for group in groups for range_ in group):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def _check_folder(prepared: Prepared) -> None:
    """Refuse to continue another run than the one that the folder holds."""
    folder = prepared.folder
    if not folder.recipe_file.is_file():
        if folder.path.is_dir() and any(folder.path.iterdir()):
            known = {"stop", "checkpoint"}
            if {entry.name for entry in folder.path.iterdir()} - known:
                raise RunError(f"{folder}: is not empty and holds no run; choose another run_dir or empty it.")
        return
    before = _flatten(load_recipe(folder.recipe_file).model_dump(mode="json"))
    now = _flatten(prepared.recipe.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(_FREE):
            raise RunError(
                f"{folder}: holds a run with {key} = {before.get(key)!r}, but the recipe now says {now.get(key)!r}; "
                "set run_dir to a new folder, change the recipe back, or remove the old run."
            )
    if folder.plan_file.is_file():
        plan = folder.plan()
        for key, value, name in (
            ("tokenizer_fingerprint", prepared.data.fingerprint, "the tokenizer"),
            ("data_manifest", prepared.data.manifest, "the data"),
        ):
            if plan.get(key) != value:
                raise RunError(
                    f"{folder}: {name} has changed since the run began (was {str(plan.get(key))[:12]}, is "
                    f"{value[:12]}); "
                    "bring the data set back, or start a new run in another run_dir."
                )


def _write_folder(prepared: Prepared, ranks: Ranks, device: Any) -> None:
    folder, data = prepared.folder, prepared.data
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json(folder.model_file, prepared.config.to_dict())
    folder.write_json(folder.environment_file, _environment(prepared, ranks, device))
    facts = {"tokenizer_fingerprint": data.fingerprint, "data_manifest": data.manifest}
    folder.write_json(folder.plan_file, prepared.plan.to_dict(facts))
    if not folder.tokenizer.is_dir():
        temporary = folder.path / ".tokenizer.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        if data.tokenizer.is_dir():
            shutil.copytree(data.tokenizer, temporary)
        else:
            temporary.mkdir(parents=True)
            shutil.copy2(data.tokenizer, temporary)
        temporary.rename(folder.tokenizer)
    # Last, because its presence is what makes a folder a run.
    folder.write_text(folder.recipe_file, prepared.recipe.to_yaml())


def _environment(prepared: Prepared, ranks: Ranks, device: Any) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": _versions(),
        "commit": git_commit(),
        "host": socket.gethostname(),
        "device": name,
        "device_type": device.type,
        "world_size": ranks.world_size,
        "launcher": ranks.launcher,
        "zero_stage": zero_stage(prepared.ds_config),
        "offload_optimizer": offload_device(prepared.ds_config, "offload_optimizer"),
        "precision": prepared.recipe.precision,
        "ds_config": prepared.ds_config,
    }


def _versions() -> dict[str, str]:
    import importlib.metadata

    packages = ("mor-pretrain", "torch", "deepspeed", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def git_commit() -> str | None:
    """Commit of the code that is running, with `+changes` where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head


def _identity(prepared: Prepared) -> dict[str, str]:
    """What all ranks must have alike, by the name a person knows it under."""
    dump = prepared.recipe.model_dump(mode="json")
    return {
        "recipe": hashlib.sha256(repr(sorted(_flatten(dump).items())).encode()).hexdigest()[:16],
        "seed": str(prepared.recipe.seed),
        "DeepSpeed configuration": hashlib.sha256(repr(prepared.ds_config).encode()).hexdigest()[:16],
        "data": prepared.data.manifest[:16],
        "tokenizer": prepared.data.fingerprint[:16],
        "code": source_digest(),
        **{f"version of {name}": version for name, version in _versions().items()},
    }


def source_digest() -> str:
    """Hash of the source files that decide what a run computes."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("mor_model", "data_prep", "pretrain"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _headline(prepared: Prepared, ranks: Ranks, step: int) -> str:
    plan = prepared.plan
    begun = f"resuming at step {step} of" if step else "training"
    return (
        f"{prepared.recipe.name}: {begun} {plan.steps} steps, {plan.tokens / 1e6:,.1f}M tokens, "
        f"{plan.training_flops:.3g} FLOPs; "
        f"{plan.parameters['total_stored'] / 1e6:.1f}M parameters; {ranks.world_size} "
        f"rank{'s' if ranks.world_size > 1 else ''}, "
        f"ZeRO stage {zero_stage(prepared.ds_config)}, {prepared.recipe.precision}; {prepared.folder}"
    )


def _closing(prepared: Prepared, state: str, step: int, reason: str | None) -> str:
    if state == "finished":
        return f"{prepared.recipe.name}: finished after {step} steps; weights are in {prepared.folder.weights}"
    why = f" ({reason})" if reason else ""
    return f"{prepared.recipe.name}: stopped after {step} of {prepared.plan.steps} steps{why}; start it again to go on."
