"""Every key that a DeepSpeed JSON may hold, and what its value must be.

Where DeepSpeed has a typed section, its own fields are the list of keys, so the check follows the installed release;
what it reads as plain dictionaries is listed here with its defaults (its runtime/constants.py and the constants beside
each section).
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, create_model

from pretrain.errors import RecipeError
from pretrain.recipe.messages import first_problem, forms, keys_of, shorten, unknown_key
from pretrain.recipe.sections import Number, Section, Whole

# What transformers and accelerate write where the trainer decides. The recipe decides here what stands in
# `FROM_THE_RECIPE`; DeepSpeed itself would take any other `auto` for its default.
AUTO_VALUE = "auto"
FROM_THE_RECIPE = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "torch_autocast.enabled",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.prefetch_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
    }
)

_OWNED = {
    "optimizer": "the recipe's optim section chooses the optimiser",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "tensorboard": "set logging.tensorboard in the recipe",
    "wandb": "set logging.wandb in the recipe",
    "csv_monitor": "metrics.jsonl is always written",
    "comet": "metrics.jsonl is always written",
}
_LARGEST_WHOLE = (1 << 63) - 1

_DataType = Literal["fp32", "fp16", "bf16"]


class _ActivationCheckpointing(Section):
    partition_activations: bool = False
    number_checkpoints: Whole | None = None
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class _Aio(Section):
    block_size: Whole = Field(default=1 << 20, ge=1)
    queue_depth: Whole = Field(default=8, ge=1)
    intra_op_parallelism: Whole = Field(default=1, ge=1)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class _FlopsProfiler(Section):
    enabled: bool = False
    recompute_fwd_factor: Number = 0.0
    profile_step: Whole = Field(default=1, ge=0)
    module_depth: Whole = -1
    top_modules: Whole = Field(default=1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class _DataTypes(Section):
    grad_accum_dtype: _DataType | None = None


class _Throughput(Section):
    enabled: bool = True
    synchronized: bool = True


class _Timers(Section):
    throughput: _Throughput = _Throughput()


class _ParallelWrite(Section):
    pipeline_stage: bool = False


class _Checkpoint(Section):
    tag_validation: Literal["Ignore", "Warn", "Fail", "ignore", "warn", "fail", "IGNORE", "WARN", "FAIL"] = "Warn"
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: _ParallelWrite = _ParallelWrite()
    # Its keys depend on the writer.
    writer: dict[str, Any] | None = None


class _TorchAutocast(Section):
    enabled: bool = False
    # What the recipe calls bf16_autocast.
    dtype: Literal["bfloat16", "bf16", "torch.bfloat16"] = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


class _File(Section):
    train_batch_size: Whole | None = Field(default=None, ge=1)
    train_micro_batch_size_per_gpu: Whole | None = Field(default=None, ge=1)
    gradient_accumulation_steps: Whole | None = Field(default=None, ge=1)
    gradient_clipping: Number = Field(default=1.0, ge=0)
    steps_per_print: Whole | None = Field(default=None, ge=1)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    prescale_gradients: bool = False
    gradient_predivide_factor: Number = Field(default=1.0, gt=0)
    communication_data_type: _DataType | None = None
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    disable_allgather: bool = False
    dataloader_drop_last: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    activation_checkpointing: _ActivationCheckpointing = _ActivationCheckpointing()
    aio: _Aio = _Aio()
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    data_types: _DataTypes = _DataTypes()
    timers: _Timers = _Timers()
    checkpoint: _Checkpoint = _Checkpoint()
    torch_autocast: _TorchAutocast = _TorchAutocast()


@functools.cache
def ds_file() -> type[BaseModel]:
    """The whole file as a model; its sections that are DeepSpeed's are those of the installed release."""
    # Imported here because DeepSpeed takes seconds to import and `recipe` alone does not need it.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return create_model(
        "DeepSpeedFile",
        __base__=_File,
        zero_optimization=(DeepSpeedZeroConfig, None),
        bf16=(DeepSpeedBF16Config, None),
        fp16=(DeepSpeedFP16Config, None),
        comms_logger=(CommsLoggerConfig, None),
    )


def check_ds_config(values: Mapping[str, Any], where: str = "deepspeed.config") -> None:
    """Check every key and value at every level.

    Raises:
        RecipeError: naming the first wrong key by its dotted path, and the nearest known key.
    """
    file = ds_file()
    for key, reason in _OWNED.items():
        if key in values:
            raise RecipeError(f"{where}: '{key}' does not belong here: {reason}; remove it.")
    _check_section(where, [], values, file)
    try:
        file.model_validate(without_auto(values))
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_problem(error, file)}") from None
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"{where}: {error}.") from None


def without_auto(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Checked values without the keys that are left to the recipe."""
    return {
        # Only the first two levels hold such keys.
        key: without_auto(value, f"{key}.") if isinstance(value, Mapping) and not above else value
        for key, value in values.items()
        if not (value == AUTO_VALUE and f"{above}{key}" in FROM_THE_RECIPE)
    }


def _check_section(where: str, above: list[str], values: Mapping[str, Any], section: type[BaseModel]) -> None:
    """Unknown keys, `auto`, and what DeepSpeed's own sections are lenient about: they read "3" as a number, take a key
    under two names, and know old ones.
    """
    fields = {name: (own, field) for own, field in section.model_fields.items() for name in (own, field.alias)}
    seen: dict[str, str] = {}
    for key, value in values.items():
        if key not in fields:
            raise RecipeError(f"{where}: {unknown_key(above, key, [*keys_of(section), *([] if above else _OWNED)])}")
        own, field = fields[key]
        path = ".".join([*above, key])
        if own in seen:
            raise RecipeError(f"{where}: {path} is another name of '{seen[own]}', which is given too; keep one.")
        seen[own] = key
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise RecipeError(f"{where}: {path} is an old name; write {extra.get('new_param')} instead.")
        kinds = forms(field.annotation)
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None and isinstance(value, dict):
            _check_section(where, [*above, key], value, inner)
        elif value == AUTO_VALUE and field.default != AUTO_VALUE:
            if path not in FROM_THE_RECIPE:
                raise RecipeError(
                    f"{where}: {path}: the recipe does not decide what 'auto' is; remove the key for DeepSpeed's "
                    f"default ({shorten(field.get_default(call_default_factory=True))}), or give {_words(kinds)}."
                )
        elif not any(_is(value, kind) for kind in kinds):
            raise RecipeError(f"{where}: {path} must be {_words(kinds)}, not {shorten(value)}.")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a kind, without the conversions that DeepSpeed would make."""
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if isinstance(value, list):
        items = get_args(kind)
        return (get_origin(kind) or kind) is list and all(_is(item, items[0]) for item in value if items)
    if isinstance(value, dict):
        return (get_origin(kind) or kind) is dict
    if value is None or isinstance(value, bool):
        return kind is type(value)
    if not isinstance(kind, type):
        return False
    if isinstance(value, str):
        # A path may be named, or a choice by its name; what no file can hold and no terminal should see is neither.
        return issubclass(kind, (str, Path)) and value.isprintable()
    if issubclass(kind, float):
        return math.isfinite(value)
    whole = isinstance(value, int) or value.is_integer()
    return issubclass(kind, int) and not issubclass(kind, bool) and whole and abs(value) <= _LARGEST_WHOLE


def _words(kinds: list[Any]) -> str:
    return " or ".join(dict.fromkeys(map(_word, kinds)))


def _word(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    kind = get_origin(kind) or kind
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in kind)}"
    if isinstance(kind, type) and issubclass(kind, (BaseModel, dict)):
        return "a JSON object"
    words = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
    return words.get(kind, "text")
