"""Llama checkpoints as vanilla networks, or as the first weights of a recursive one that is then trained further.

Initialisation of shared layers: Bae et al. 2024, "Relaxed Recursive Transformers" (arXiv 2410.20672), section 2.2.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mor_model.config import ModelConfig, RouterConfig
from mor_model.errors import ConfigError
from mor_model.hub.llama import State, config_from_llama, from_llama
from mor_model.model import RecursiveTransformer

Initialization = Literal["stepwise", "average"]
_LAYER = "layers."


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
        sharing, recursions: how layers are shared, see `mor_model.schedule`; `none` keeps the model as it is.
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
    vanilla = config_from_llama(_read_json(folder / "config.json"), str(folder / "config.json"))
    config = dataclasses.replace(vanilla, sharing=sharing, recursions=recursions, router=router)
    state = from_llama(_read_tensors(folder), vanilla, str(folder))
    if initialization not in ("stepwise", "average"):
        raise ConfigError(f"initialization: {initialization!r} is not 'stepwise' or 'average'.")
    sources = layer_sources(config, initialization)
    shared = {name: tensor for name, tensor in state.items() if not name.startswith(_LAYER)}
    for stored, originals in enumerate(sources):
        for name in _names_in_layer(state):
            shared[f"{_LAYER}{stored}.{name}"] = _mean([state[f"{_LAYER}{layer}.{name}"] for layer in originals])
    if router is not None:
        shared |= _new_router(config, seed)
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


def _names_in_layer(state: State) -> list[str]:
    return [name.removeprefix(f"{_LAYER}0.") for name in state if name.startswith(f"{_LAYER}0.")]


def _new_router(config: ModelConfig, seed: int) -> State:
    model = RecursiveTransformer(config)
    model.initialize(seed)
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("router.")}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; name a folder with a transformers checkpoint.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON ({error}); download the checkpoint again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} does not hold a JSON object; download the checkpoint again.")
    return values


def _read_tensors(folder: Path) -> State:
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    tensors: State = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise ConfigError(
                f"{folder / name} is missing; the checkpoint is incomplete or not in safetensors."
            ) from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{folder / name} cannot be read ({error}); download it again.") from None
    return tensors
