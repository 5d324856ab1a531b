"""Llama checkpoints as vanilla networks, or as the first weights of a recursive one that is then trained further.

Initialisation of shared layers: Bae et al. 2024, "Relaxed Recursive Transformers" (arXiv 2410.20672), section 2.2.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mor_model.config import ModelConfig, RouterConfig
from mor_model.errors import ConfigError
from mor_model.hub.llama import State, config_from_llama, from_llama
from mor_model.model import RecursiveTransformer
from mor_model.model_files import plain_name, read_json, read_tensors

Initialization = Literal["stepwise", "average"]
_LAYER = "layers."
_AGAIN = "download the checkpoint again"


def import_hf(
    path: str | os.PathLike[str],
    *,
    sharing: str = "none",
    recursions: int = 1,
    router: RouterConfig | None = None,
    initialization: Initialization = "stepwise",
    seed: int = 0,
) -> tuple[ModelConfig, State]:
    """Read a Llama checkpoint.

    Args:
        path: folder with config.json and model.safetensors (whole, or in parts with an index).
        sharing, recursions: how layers are shared, see `mor_model.layer_schedule`; `none` keeps the model as it is.
        router: of a network with more than one recursion; its weights are new.
        initialization: what a shared layer starts from. `stepwise` takes layers at even steps through the depth it
            replaces, the first and the last among them; `average` the mean of all layers it stands for. Layers that
            are not shared are taken over.
        seed: of the router's weights.

    Returns:
        The configuration, and the weights for `mor_model.save_weights`.

    Raises:
        ConfigError: when the checkpoint is incomplete or no plain Llama, or its depth cannot be shared so.
    """
    folder = Path(path)
    vanilla = config_from_llama(read_json(folder / "config.json", _AGAIN), str(folder / "config.json"))
    config = dataclasses.replace(vanilla, sharing=sharing, recursions=recursions, router=router)
    state = from_llama(_read_tensors(folder), vanilla, str(folder))
    if initialization not in ("stepwise", "average"):
        raise ConfigError(f"initialization: {initialization!r} is not 'stepwise' or 'average'.")
    shared = {name: tensor for name, tensor in state.items() if not name.startswith(_LAYER)}
    names = [name.removeprefix(f"{_LAYER}0.") for name in state if name.startswith(f"{_LAYER}0.")]
    for stored, originals in enumerate(layer_sources(config, initialization)):
        for name in names:
            shared[f"{_LAYER}{stored}.{name}"] = _mean([state[f"{_LAYER}{layer}.{name}"] for layer in originals])
    if router is not None:
        model = RecursiveTransformer(config)
        model.initialize(seed)
        shared |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("router.")}
    return config, shared


def layer_sources(config: ModelConfig, initialization: Initialization) -> list[list[int]]:
    """For each stored layer, the layers of the unshared network that it starts from (the mean of them)."""
    schedule = config.schedule
    places: list[list[int]] = [[] for _ in range(schedule.num_stored)]
    for place, stored in enumerate(schedule.applications):
        places[stored].append(place)
    if initialization == "average":
        return places
    looped = sorted({stored for step in schedule.steps for stored in step})
    first, last = places[looped[0]][0], max(places[stored][-1] for stored in looped)
    for order, stored in enumerate(looped):
        share = order / (len(looped) - 1) if len(looped) > 1 else 0.0
        places[stored] = [round(first + share * (last - first))]
    return places


def _mean(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _read_tensors(folder: Path) -> State:
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        places = read_json(index, _AGAIN).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ConfigError(f"{index}: its weight_map names no files; {_AGAIN}.")
        files = sorted({plain_name(name, index) for name in places.values()})
    tensors: State = {}
    for name in files:
        tensors |= read_tensors(folder / name, _AGAIN)
    return tensors
