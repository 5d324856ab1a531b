"""A model on disk: `model.safetensors` and `model.json` (the configuration) in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError, shown
from mor_model.initialization import Gathered, whole
from mor_model.model import RecursiveTransformer
from mor_model.model_files import opened_tensors, read_json, read_tensors

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "model.json"
TIED_HEAD = "head.weight"
_AGAIN = "copy or export the model again"
_PRECISIONS = ("F64", "F32", "BF16", "F16")  # as safetensors names them
# What may differ between stored weights and the network that starts from them: it changes no weight's meaning. Routers
# are compared by their weights.
_FREE = {"context_length", "init_std", "router", "kv_sharing", "document_masking", "reset_positions"}


def save_weights(folder: str | Path, state_dict: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write weights and configuration; a tied output head is stored once, as the embedding.

    Each file appears whole or not at all; the configuration, which names the folder a model, comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in state_dict.items()
        if not (config.tie_embeddings and name == TIED_HEAD)
    }
    description = json.dumps(config.to_dict(), indent=2) + "\n"
    _write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write(folder / CONFIG_FILE, lambda path: path.write_text(description, encoding="utf-8"))


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> RecursiveTransformer:
    """Rebuild a saved model, in evaluation mode.

    Args:
        folder: what `save_weights` wrote.
        dtype: precision of the parameters; None keeps what is stored.
        device: where to put them.

    Raises:
        ConfigError: when a file is missing or damaged, or weights and configuration do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    model = _fitting(folder, config)
    tensors = read_tensors(folder / WEIGHTS_FILE, _AGAIN)
    if config.tie_embeddings:
        tensors[TIED_HEAD] = tensors["embedding.weight"]
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device=device, dtype=dtype).eval()


def check_start(folder: str | Path, config: ModelConfig) -> None:
    """Check, without reading a weight, that a network of `config` can start from what `save_weights` wrote.

    Raises:
        ConfigError: naming the file that is missing or damaged, or the first thing that differs.
    """
    folder = Path(folder)
    # A head's width may be given or follow from the other sizes.
    stored, wanted = (
        {**one.to_dict(), "head_dim": one.head_width} for one in (_read_config(folder / CONFIG_FILE), config)
    )
    for key in wanted:
        if key not in _FREE and stored[key] != wanted[key]:
            raise ConfigError(
                f"model.{key}: is {wanted[key]!r}, but the weights in {folder} are those of a network with "
                f"{stored[key]!r}; use the same or start from other weights."
            )
    _fitting(folder, config)


def start_from(model: RecursiveTransformer, folder: str | Path, gathered: Gathered = whole) -> None:
    """Fill a network in place with stored weights that `check_start` found to fit, one tensor at a time.

    Args:
        model: on every rank alike. folder: what `save_weights` wrote.
        gathered: as for `mor_model.initialization.initialize`.
    """
    with opened_tensors(Path(folder) / WEIGHTS_FILE, _AGAIN) as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            with gathered(parameter):
                parameter.copy_(file.get_tensor(name))
        buffers = dict(model.named_buffers())
        for name in buffers.keys() & set(file.keys()):
            buffers[name].copy_(file.get_tensor(name))


def _read_config(path: Path) -> ModelConfig:
    values = read_json(path, _AGAIN)
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _fitting(folder: Path, config: ModelConfig) -> RecursiveTransformer:
    """The network of `config`, without memory for its weights; those in `folder` were found to be of its kind."""
    with torch.device("meta"):
        model = RecursiveTransformer(config)
    expected = {name: t for name, t in model.state_dict().items() if not (config.tie_embeddings and name == TIED_HEAD)}
    with opened_tensors(folder / WEIGHTS_FILE, _AGAIN) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    missing, surplus = sorted(expected.keys() - kinds.keys()), sorted(kinds.keys() - expected.keys())
    if missing or surplus:
        said = "; ".join(
            f"{what} {shown(names[0])}" for what, names in (("missing", missing), ("unknown", surplus)) if names
        )
        raise ConfigError(f"{folder}: {WEIGHTS_FILE} does not fit the network ({said}); export the model again.")
    for name, tensor in expected.items():
        shape, dtype = kinds[name]
        if shape != tensor.shape:
            raise ConfigError(
                f"{folder}: {name} has shape {shown(shape)} where the network has {tuple(tensor.shape)}; export the "
                "model again."
            )
        if tensor.is_floating_point() and dtype not in _PRECISIONS:
            raise ConfigError(f"{folder}: {name} holds {dtype}, which no weight does; {_AGAIN}.")
    return model


def _write(path: Path, writer: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
