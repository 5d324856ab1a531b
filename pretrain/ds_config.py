"""The DeepSpeed JSON, checked key by key and against the recipe before any process group starts.

DeepSpeed accepts and ignores what it does not know: `gradient_cliping` trains without clipping. Here an unknown key at
any level is refused with the nearest known one. Batch, precision and clipping belong to the recipe: a file may leave
them out (they are filled in) or repeat them (they must agree). Where DeepSpeed has a typed section, its own fields are
the list of keys, so the check follows the installed release.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import ds_configs
from pretrain.errors import RecipeError
from pretrain.partitioning import complete
from pretrain.recipe import Recipe

# Stands for the name of a shipped configuration that `pretrain.stage` chooses.
AUTO = "auto"
_OPEN = None  # a section whose keys DeepSpeed does not name (free parameters)

# Sections that DeepSpeed reads as plain dictionaries (its runtime/constants.py and the constants beside each section).
_PLAIN_SECTIONS: dict[str, tuple[str, ...] | None] = {
    "activation_checkpointing": (
        "partition_activations",
        "number_checkpoints",
        "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary",
        "profile",
        "cpu_checkpointing",
    ),
    "aio": (
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "single_submit",
        "overlap_events",
        "use_gds",
    ),
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "data_types": ("grad_accum_dtype",),
    "timers": ("throughput",),
    "timers.throughput": ("enabled", "synchronized"),
    "checkpoint": ("tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer"),
    "checkpoint.parallel_write": ("pipeline_stage",),
    "checkpoint.writer": _OPEN,
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}

_SCALARS: dict[str, tuple[type, ...]] = {
    "train_batch_size": (int,),
    "train_micro_batch_size_per_gpu": (int,),
    "gradient_accumulation_steps": (int,),
    "gradient_clipping": (int, float),
    "steps_per_print": (int, type(None)),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": (int, float),
    "communication_data_type": (str, type(None)),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
    "disable_allgather": (bool,),
    "dataloader_drop_last": (bool,),
    "log_level": (str, type(None)),
}

_OWNED = {
    "optimizer": "the recipe's optim section chooses the optimiser",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "tensorboard": "set logging.tensorboard in the recipe",
    "wandb": "set logging.wandb in the recipe",
    "csv_monitor": "metrics.jsonl is always written",
    "comet": "metrics.jsonl is always written",
}

_PRECISION_SECTIONS = {"bf16": "bf16", "fp16": "fp16", "torch_autocast": "bf16_autocast"}


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: the name of one in `ds_configs` (`zero3`) or a path; only its syntax is checked.

    Raises:
        RecipeError: when there is no such file or it is not a JSON object without repeated keys.
    """
    path = Path(name)
    if path.suffix != ".json" and not path.exists():
        names = [AUTO, *ds_configs.names()]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = (
                f"did you mean '{near[0]}'?"
                if near
                else f"known names are {', '.join(names)}; or give the path of a .json file."
            )
            raise RecipeError(f"deepspeed.config: no DeepSpeed configuration '{name}'; {hint}")
        path = ds_configs.path(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeated(path))
    except FileNotFoundError:
        raise RecipeError(f"deepspeed.config: {path}: no such file.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"deepspeed.config: {path}: not readable as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"deepspeed.config: {path}: must be a JSON object.")
    return values


def check_ds_config(values: Mapping[str, Any], where: str = "deepspeed.config") -> None:
    """Check every key at every level, and every value that DeepSpeed has a type for.

    Raises:
        RecipeError: naming the first wrong key by its dotted path, and the nearest known key.
    """
    typed = _typed_sections()
    known = [*_SCALARS, *typed, *(name for name in _PLAIN_SECTIONS if "." not in name), *_OWNED]
    for key, value in values.items():
        if key in _OWNED:
            raise RecipeError(f"{where}: '{key}' does not belong here: {_OWNED[key]}; remove it.")
        if key in _SCALARS:
            _check_scalar(where, key, value)
        elif key in typed:
            _check_typed(where, key, value, typed[key])
        elif key in _PLAIN_SECTIONS:
            _check_plain(where, key, value)
        else:
            _refuse(where, key, known)


def resolve_ds_config(recipe: Recipe, world_size: int, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The complete configuration that DeepSpeed is started with.

    Args:
        recipe: with `precision` resolved (not `auto`).
        world_size: number of ranks.
        values: contents of a DeepSpeed JSON; None reads `recipe.deepspeed.config`.

    Raises:
        RecipeError: when a key is unknown, the batch cannot be divided over the ranks, or the file contradicts the
            recipe.
    """
    where = f"DeepSpeed configuration '{recipe.deepspeed.config}'"
    given = dict(load_ds_config(recipe.deepspeed.config) if values is None else values)
    check_ds_config(given, where)
    batch = recipe.batch
    start = batch.warmup_from or batch.sequences
    if start % (batch.micro_batch * world_size):
        name = "batch.sequences" if batch.warmup_from is None else "batch.warmup_from"
        raise RecipeError(
            f"{name}: {start} is not micro_batch ({batch.micro_batch}) x {world_size} ranks x a whole number of "
            "accumulation "
            f"steps; {_batch_advice(start, batch.micro_batch, world_size)}"
        )
    expected = {
        "train_batch_size": (batch.sequences, "batch.sequences"),
        "train_micro_batch_size_per_gpu": (batch.micro_batch, "batch.micro_batch"),
        "gradient_accumulation_steps": (
            batch.sequences // (batch.micro_batch * world_size),
            f"batch.sequences / (batch.micro_batch x {world_size} ranks)",
        ),
        "gradient_clipping": (recipe.optim.grad_clip, "optim.grad_clip"),
    }
    for key, (value, source) in expected.items():
        if key in given and given[key] != value:
            raise RecipeError(
                f"{where}: {key} is {given[key]} but the recipe's {source} is {value}; make them agree or remove the "
                "key."
            )
        given[key] = value
    _resolve_precision(recipe, where, given)
    _check_stage(recipe, where, given)
    if recipe.optim.name == "muon":
        _admit_muon(recipe, where, given)
    given["zero_optimization"] = complete(given.get("zero_optimization", {}), recipe.network())
    given.setdefault("steps_per_print", None)
    return given


def zero_stage(values: Mapping[str, Any]) -> int:
    """ZeRO stage of a checked configuration."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: Mapping[str, Any], section: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts its tensors: none, cpu or nvme."""
    return str((values.get("zero_optimization", {}).get(section) or {}).get("device", "none"))


def _resolve_precision(recipe: Recipe, where: str, given: dict[str, Any]) -> None:
    for section, precision in _PRECISION_SECTIONS.items():
        enabled = (given.get(section) or {}).get("enabled")
        if enabled is not None and enabled != (precision == recipe.precision):
            raise RecipeError(
                f"{where}: {section}.enabled is {str(enabled).lower()} but the recipe's precision is "
                f"{recipe.precision}; "
                f"make them agree or remove the section."
            )
    for section, precision in _PRECISION_SECTIONS.items():
        if precision == recipe.precision:
            given[section] = {**(given.get(section) or {}), "enabled": True}
            if section == "torch_autocast":
                given[section].setdefault("dtype", "bfloat16")
        else:
            given.pop(section, None)


def _check_stage(recipe: Recipe, where: str, given: Mapping[str, Any]) -> None:
    stage = zero_stage(given)
    if stage == 0 and recipe.precision in ("bf16", "fp16"):
        raise RecipeError(
            f"{where}: {recipe.precision} at ZeRO stage 0 keeps no fp32 master weights and diverges; use zero1 to "
            "zero3, "
            "or precision fp32 or bf16_autocast."
        )
    accumulation = (given.get("data_types") or {}).get("grad_accum_dtype")
    if stage == 1 and recipe.precision == "bf16" and accumulation == "fp32":
        raise RecipeError(
            f"{where}: data_types.grad_accum_dtype fp32 with bf16 at stage 1 switches off the check for non-finite "
            "gradients; "
            "use zero2 or zero3, or remove the key."
        )
    if (given.get("bf16") or {}).get("check_grad_overflow") is False:
        raise RecipeError(
            f"{where}: bf16.check_grad_overflow must stay on; without it one non-finite step ruins the weights."
        )
    if "activation_checkpointing" in given and recipe.checkpointing != "none":
        raise RecipeError(
            f"{where}: activation_checkpointing configures DeepSpeed's own checkpointing, which is wrong for shared "
            "layers; "
            "remove the section, the recipe's checkpointing does it."
        )
    nvme = [s for s in ("offload_param", "offload_optimizer") if offload_device(given, s) == "nvme"]
    for section in nvme:
        path = given["zero_optimization"][section].get("nvme_path")
        if not path or not Path(path).is_dir():
            raise RecipeError(
                f"{where}: zero_optimization.{section}.nvme_path: {path!r} is not a folder; name one on a local NVMe "
                "disk."
            )


def _admit_muon(recipe: Recipe, where: str, given: dict[str, Any]) -> None:
    offloaded = [s for s in ("offload_optimizer", "offload_param") if offload_device(given, s) != "none"]
    if offloaded:
        raise RecipeError(
            f"{where}: zero_optimization.{offloaded[0]} keeps matrices off the device, where Muon cannot put them "
            "together; use zero0 to zero3, or optim.name adamw."
        )
    if recipe.checkpoint.universal:
        raise RecipeError(
            "checkpoint.universal: DeepSpeed's converter knows Adam's states only, so a run with Muon goes on with the "
            "number of ranks it began with; remove it, or use optim.name adamw."
        )
    if zero_stage(given):
        # DeepSpeed's word for any optimiser that it did not bring itself.
        given["zero_allow_untested_optimizer"] = True


def _batch_advice(start: int, micro: int, world: int) -> str:
    per_rank = [size for size in range(1, micro + 1) if start % (size * world) == 0]
    if per_rank:
        return f"set batch.micro_batch to {per_rank[-1]}, or make it a multiple of {micro * world}."
    below = start // (micro * world) * micro * world
    choices = [str(value) for value in (below, below + micro * world) if value > 0]
    multiple = f"make it a multiple of {micro * world} ({' or '.join(choices)})"
    return f"{multiple}, or use a number of ranks that divides {start}."


def _typed_sections() -> dict[str, type[BaseModel]]:
    # Imported here because DeepSpeed takes seconds to import and `recipe` alone does not need it.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }


def _check_typed(where: str, path: str, value: Any, model: type[BaseModel]) -> None:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: {path} must be a JSON object, not {value!r}.")
    fields = {(field.alias or name): field for name, field in model.model_fields.items()}
    for name in model.model_fields:
        fields.setdefault(name, model.model_fields[name])
    for key, inner in value.items():
        if key not in fields:
            _refuse(where, f"{path}.{key}", [f"{path}.{name}" for name in fields])
        nested = _nested_model(fields[key].annotation)
        if nested is not None and isinstance(inner, dict):
            _check_typed(where, f"{path}.{key}", inner, nested)
    try:
        model(**value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join([path, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {place}: {message} (given: {problem.get('input')!r}).") from None
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"{where}: {path}: {error}.") from None


def _check_plain(where: str, path: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: {path} must be a JSON object, not {value!r}.")
    known = _PLAIN_SECTIONS[path]
    if known is _OPEN:
        return
    for key, inner in value.items():
        if key not in known:
            _refuse(where, f"{path}.{key}", [f"{path}.{name}" for name in known])
        if f"{path}.{key}" in _PLAIN_SECTIONS:
            _check_plain(where, f"{path}.{key}", inner)


def _check_scalar(where: str, key: str, value: Any) -> None:
    types = _SCALARS[key]
    if (isinstance(value, bool) and bool not in types) or not isinstance(value, types):
        names = " or ".join(
            "null"
            if t is type(None)
            else {"int": "whole number", "float": "number", "bool": "true/false", "str": "text"}[t.__name__]
            for t in types
        )
        raise RecipeError(f"{where}: {key} must be {names}, not {json.dumps(value)}.")


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _nested_model(argument)
        if found is not None:
            return found
    return None


def _refuse(where: str, path: str, known: list[str]) -> None:
    _, _, key = path.rpartition(".")
    names = sorted(name.rpartition(".")[2] for name in known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(names)}."
    raise RecipeError(f"{where}: unknown key '{path}'; {hint}")


def _refuse_repeated(path: Path) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise RecipeError(
                    f"deepspeed.config: {path}: key '{key}' appears twice; JSON keeps only the last one, so remove one."
                )
            seen[key] = value
        return seen

    return build
