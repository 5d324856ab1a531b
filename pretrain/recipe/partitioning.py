"""Communication and partitioning settings that follow from the size of the network.

DeepSpeed's defaults are made for networks of many billion parameters: a bucket of 5e8 gradients is larger than a 360m
model, so nothing would be sent before its backward pass has ended, and its buffer takes 1 GB. What a DeepSpeed JSON
says itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mor_model.config import ModelConfig
from mor_model.flops import count_parameters

# Below a few million elements a collective is all latency; above a few hundred million nothing is gained.
_SMALLEST, _LARGEST = 5_000_000, 200_000_000

STAGES = (
    "every rank holds everything",
    "optimiser states are partitioned",
    "optimiser states and gradients are partitioned",
    "weights, gradients and optimiser states are partitioned",
)
"""What each ZeRO stage means, by its number."""


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
    settings = [Setting("reduce_bucket_size", bucket, "gradients of two layers: sent while others are computed")]
    if stage < 3:
        return [*settings, Setting("allgather_bucket_size", bucket, "as many updated weights at a time")]
    ahead = min(_LARGEST, max(_SMALLEST, layer))
    return [*settings, Setting("stage3_prefetch_bucket_size", ahead, "gathered ahead: a layer beyond the present one")]


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
