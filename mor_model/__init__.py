"""Vanilla, recursive and Mixture-of-Recursions language models as one network, in plain PyTorch.

A name is loaded when it is first used: configuration, layer schedules and FLOPs accounting do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_model.config import ExpertChoiceConfig as ExpertChoiceConfig
    from mor_model.config import ModelConfig as ModelConfig
    from mor_model.config import TokenChoiceConfig as TokenChoiceConfig
    from mor_model.errors import ConfigError as ConfigError
    from mor_model.layer_schedule import LayerSchedule as LayerSchedule
    from mor_model.model import RecursiveTransformer as RecursiveTransformer
    from mor_model.outputs import ModelOutput as ModelOutput
    from mor_model.outputs import Routing as Routing
    from mor_model.presets import preset as preset
    from mor_model.weights import load_model as load_model
    from mor_model.weights import save_weights as save_weights

_HOMES = {
    "ConfigError": "errors",
    "ExpertChoiceConfig": "config",
    "LayerSchedule": "layer_schedule",
    "ModelConfig": "config",
    "ModelOutput": "outputs",
    "RecursiveTransformer": "model",
    "Routing": "outputs",
    "TokenChoiceConfig": "config",
    "load_model": "weights",
    "preset": "presets",
    "save_weights": "weights",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mor_model' has no attribute '{name}'")
    value = getattr(import_module(f"mor_model.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
