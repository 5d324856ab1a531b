"""`deepspeed.config: auto`: the lowest ZeRO stage at which a rank fits into its device.

A lower stage moves less between ranks. The choice is made once and written to the run's recipe.yaml, from which later
starts take it, because a checkpoint belongs to its stage. On other hardware a later start only compares the memory with
the estimate and warns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.errors import RecipeError
from pretrain.ranks.environment import Ranks
from pretrain.recipe.deepspeed_json import AUTO, resolve_ds_config, zero_stage
from pretrain.recipe.recipe import Recipe, load_recipe
from pretrain.records.run_folder import RunFolder

_CANDIDATES = ("zero0", "zero1", "zero2", "zero3")
# The estimate holds to 15 %. A GPU's context and the buffers of collectives take memory too; on a CPU the allocator
# keeps what is freed, and a process grows to as much as 1.4 times what is alive.
_USABLE_ON_GPU, _USABLE_ON_CPU = 0.8, 0.65


@dataclass(frozen=True)
class StageChoice:
    """Which DeepSpeed configuration a run uses, and why.

    Attributes:
        config: its name or path; automatic: whether the recipe left it open (`auto`).
        ds_config: the complete DeepSpeed JSON.
        reason: half a sentence.
        considered: a line for each stage that was looked at; empty where nothing was to be chosen.
        warning: what to tell when the choice was made elsewhere and does not seem to fit here.
    """

    config: str
    automatic: bool
    reason: str
    ds_config: dict[str, Any]
    considered: tuple[str, ...] = ()
    warning: str | None = None


def choose_stage(recipe: Recipe, ranks: Ranks, *, memory: int | None = None, on_cpu: bool | None = None) -> StageChoice:
    """What the recipe names; else what its run began with; else the lowest ZeRO stage that fits.

    Args:
        recipe: with its precision resolved.
        memory: bytes that this rank has on its device; None asks the device.
        on_cpu: whether that is a CPU; None asks.

    Raises:
        RecipeError: when no stage fits, or none is possible with the rest of the recipe.
    """
    from pretrain.training.memory import estimate_memory, format_bytes, peak_of_passes

    name = recipe.deepspeed.config
    if name != AUTO:
        return StageChoice(name, False, "as the recipe says", resolve_ds_config(recipe, ranks.world_size))
    on_cpu = trains_on_cpu() if on_cpu is None else on_cpu
    memory = device_memory(ranks, on_cpu) if memory is None else memory
    usable = _USABLE_ON_CPU if on_cpu else _USABLE_ON_GPU
    limit = int(usable * memory)
    passes = peak_of_passes(recipe)

    def needed(ds_config: Mapping[str, Any]) -> int:
        return estimate_memory(recipe, ds_config, ranks.world_size, on_cpu=on_cpu, passes=passes).total

    begun = RunFolder(recipe.run_folder).recipe_file
    if begun.is_file():
        before = load_recipe(begun).deepspeed.config
        ds_config = resolve_ds_config(with_stage(recipe, before), ranks.world_size)
        size = needed(ds_config)
        warning = None
        if size > limit:
            warning = (
                f"The run began with {before}, which needs about {format_bytes(size)} a rank here, of "
                f"{format_bytes(memory)}. Should memory run out: more ranks, a smaller batch.micro_batch, or another "
                "deepspeed.config with checkpoint.weights_only."
            )
        return StageChoice(before, True, "auto: the run began with it", ds_config, warning=warning)
    lines, refused = [], ""
    for candidate in _CANDIDATES:
        try:
            ds_config = resolve_ds_config(with_stage(recipe, candidate), ranks.world_size)
            _refuse_rounded_sums(recipe, ds_config)
        except RecipeError as error:
            refused = str(error)
            lines.append(f"{candidate}: refused: {refused}")
            continue
        refused, size = "", needed(ds_config)
        if size <= limit:
            reason = f"auto: the lowest stage that fits into {format_bytes(limit)}, {usable:.0%} of a rank's memory"
            lines.append(f"{candidate}: about {format_bytes(size)} a rank")
            return StageChoice(candidate, True, reason, ds_config, tuple(lines))
        lines.append(f"{candidate}: about {format_bytes(size)} a rank, too much")
    raise RecipeError(
        # What is wrong with every stage is not the stage.
        refused
        or f"deepspeed.config: auto: no ZeRO stage fits into {format_bytes(limit)}, {usable:.0%} of a rank's memory "
        f"({'; '.join(lines)}). Lower batch.micro_batch, set activation_checkpointing to recursion, use more ranks, or "
        "name zero3_offload_optimizer; naming zero3 tries it all the same."
    )


def _refuse_rounded_sums(recipe: Recipe, ds_config: Mapping[str, Any]) -> None:
    """How much memory there is must not decide how gradients are rounded."""
    if (
        zero_stage(ds_config) == 1
        and recipe.precision in ("bf16", "fp16")
        and ds_config["gradient_accumulation_steps"] > 1
    ):
        raise RecipeError(f"stage 1 adds up the gradients of several micro-batches in {recipe.precision}.")


def with_stage(recipe: Recipe, config: str) -> Recipe:
    """The recipe with another DeepSpeed configuration."""
    return recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"config": config})})


def agree_on_stage(mine: StageChoice, recipe: Recipe) -> StageChoice:
    """The highest stage that any rank has chosen, which is that of the rank with the least memory. Collective over all
    ranks, also those that had nothing to choose.
    """
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine.config if mine.automatic else "")
    highest = max(everyone)
    if not mine.automatic or highest == mine.config:
        return mine
    reason = f"auto: rank {everyone.index(highest)} has the least memory"
    ds_config = resolve_ds_config(with_stage(recipe, highest), dist.get_world_size())
    return replace(mine, config=highest, reason=reason, ds_config=ds_config)


def trains_on_cpu() -> bool:
    """Whether DeepSpeed will use the CPU."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def device_memory(ranks: Ranks, on_cpu: bool) -> int:
    """Bytes that this rank has: its device's; on a CPU, its share of what the machine has available now, or of what a
    control group (of Slurm or a container) allows.
    """
    if not on_cpu:
        import torch

        return torch.cuda.get_device_properties(ranks.device).total_memory
    import psutil

    return min([psutil.virtual_memory().available, *_group_limits()]) // ranks.local_world_size


def _group_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Memory limits of the control groups that this process is in, versions 1 and 2."""
    limits = []
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.strip("/")
        for part in (group, *group.parents):
            file = part / name
            text = file.read_text(encoding="ascii").strip() if file.is_file() else "max"
            if text != "max":
                limits.append(int(text))
    return limits
