"""The DeepSpeed JSON, checked key by key and against the recipe before any process group starts.

DeepSpeed accepts and ignores what it does not know: `gradient_cliping` trains without clipping. Here an unknown key at
any level is refused with the nearest known one. Batch, precision and clipping belong to the recipe: a file may leave
them out or say `auto` (they are filled in) or repeat them (they must agree).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ds_configs
from data_prep.errors import DataError
from data_prep.json_input import read_json
from data_prep.plain_text import plain
from mor_model.config import ModelConfig
from mor_model.flops import count_parameters
from pretrain.errors import RecipeError
from pretrain.recipe.deepspeed_keys import check_ds_config, without_auto
from pretrain.recipe.messages import nearest, shorten
from pretrain.recipe.recipe import Recipe

# Stands for the name of a shipped configuration that `pretrain.training.zero_stage` chooses.
AUTO = "auto"

# Beyond this the loss scale of fp16 is no number that fp32 holds.
_LARGEST_SCALE_POWER = 100
_PRECISION_SECTIONS = {"bf16": "bf16", "fp16": "fp16", "torch_autocast": "bf16_autocast"}
# Below a few million elements a collective is all latency; above a few hundred million nothing is gained.
_SMALLEST, _LARGEST = 5_000_000, 200_000_000

STAGES = (
    "every rank holds everything",
    "optimiser states are partitioned",
    "optimiser states and gradients are partitioned",
    "weights, gradients and optimiser states are partitioned",
)
"""What each ZeRO stage partitions, by its number."""


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: the name of one in `ds_configs` (`zero3`), or a path, which has a slash or ends in .json;
    only its syntax is checked.

    Raises:
        RecipeError: when there is no such file, it is not a JSON object without repeated keys, or `name` is `auto`, for
            which a run chooses (`pretrain.training.zero_stage`).
    """
    if name == AUTO:
        raise RecipeError(
            "deepspeed.config: auto is chosen from the memory of the ranks when a run starts; name a configuration "
            f"here ({', '.join(ds_configs.names())})."
        )
    if "/" in name or name.endswith(".json"):
        path = Path(name)
    elif name in ds_configs.names():
        # Also where the working directory holds something of that name.
        path = ds_configs.path(name)
    else:
        hint = nearest(name, [AUTO, *ds_configs.names()])
        raise RecipeError(
            f"deepspeed.config: no DeepSpeed configuration {shorten(name)}; {hint} Or give the path of a .json file."
        )
    try:
        values = read_json(path, unique_keys=True)
    except FileNotFoundError:
        raise RecipeError(f"deepspeed.config: {plain(path)}: no such file.") from None
    except DataError as error:
        raise RecipeError(f"deepspeed.config: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"deepspeed.config: {path}: must be a JSON object.")
    return values


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
    where = f"DeepSpeed configuration '{plain(recipe.deepspeed.config)}'"
    read = load_ds_config(recipe.deepspeed.config) if values is None else values
    check_ds_config(read, where)
    given = without_auto(read)
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
                f"{where}: {key} is {shorten(given[key])} but the recipe's {source} is {value}; make them agree or "
                "remove the key."
            )
        given[key] = value
    _resolve_precision(recipe, where, given)
    _check_stage(recipe, where, given)
    if recipe.optim.name == "muon":
        _admit_muon(recipe, where, given)
    given["zero_optimization"] = complete(given.get("zero_optimization", {}), recipe.network)
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
    power = (given.get("fp16") or {}).get("initial_scale_power", 0)
    if abs(power) > _LARGEST_SCALE_POWER:
        raise RecipeError(f"{where}: fp16.initial_scale_power: must be at most {_LARGEST_SCALE_POWER}, such as 16.")
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
    if "activation_checkpointing" in given and recipe.activation_checkpointing != "none":
        raise RecipeError(
            f"{where}: activation_checkpointing configures DeepSpeed's own checkpointing, which is wrong for shared "
            "layers; "
            "remove the section, the recipe's activation_checkpointing does it."
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
    per_rank = next((size for size in range(micro, 0, -1) if start % (size * world) == 0), None)
    if per_rank is not None:
        return f"set batch.micro_batch to {per_rank}, or make it a multiple of {micro * world}."
    below = start // (micro * world) * micro * world
    choices = [str(value) for value in (below, below + micro * world) if value > 0]
    multiple = f"make it a multiple of {micro * world} ({' or '.join(choices)})"
    return f"{multiple}, or use a number of ranks that divides {start}."


@dataclass(frozen=True)
class Setting:
    """One key of `zero_optimization`, what is chosen for it, and why."""

    key: str
    value: int
    reason: str


def choose_settings(stage: int, config: ModelConfig) -> list[Setting]:
    """Settings for a network at a ZeRO stage, in elements.

    Buckets hold two layers' gradients, so that the first is on its way when the third is computed.
    """
    if stage == 0:
        return []
    layer = count_parameters(config).layers // config.schedule.num_stored
    bucket = min(_LARGEST, max(_SMALLEST, 2 * layer))
    settings = [Setting("reduce_bucket_size", bucket, "gradients of two layers, sent while others are computed")]
    if stage < 3:
        return [*settings, Setting("allgather_bucket_size", bucket, "updated weights gathered at a time")]
    ahead = min(_LARGEST, max(_SMALLEST, layer))
    return [*settings, Setting("stage3_prefetch_bucket_size", ahead, "one layer gathered ahead of its use")]


def complete(zero: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A `zero_optimization` section with what it leaves open chosen by `choose_settings`."""
    chosen = {setting.key: setting.value for setting in choose_settings(int(zero.get("stage", 0)), config)}
    # DeepSpeed takes these keys with and without the prefix.
    given = {key if key in chosen else f"stage3_{key}" for key in zero}
    return {**zero, **{key: value for key, value in chosen.items() if key not in given}}


def explain(zero: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """A line for each setting: its value, and why it was chosen or that the file says so."""
    lines = []
    for setting in choose_settings(int(zero.get("stage", 0)), config):
        value = zero.get(setting.key, zero.get(setting.key.removeprefix("stage3_")))
        reason = setting.reason if value == setting.value else "as the DeepSpeed configuration says"
        lines.append(f"{setting.key} {value:,}: {reason}")
    return lines
