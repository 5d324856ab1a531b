"""Named sizes, each as vanilla, recursive or MoR.

Sizes 135m, 360m, 730m and 1.7b are the paper's (arXiv 2507.10524, appendix table of architectures; SmolLM's shapes).
`350m` and `1.3b` are the GPT-3 shapes, used by the cluster recipes, in this architecture. `tiny` is for tests and
laptops.
"""

from __future__ import annotations

from typing import Any, Literal

from mor_model.config import ExpertChoiceConfig, ModelConfig, check_sizes
from mor_model.errors import ConfigError, shown
from mor_model.layer_schedule import valid_depth

Variant = Literal["vanilla", "recursive", "mor"]

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 8,
        "hidden_size": 128,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 384,
        "context_length": 256,
        "vocab_size": 8192,
    },
    "135m": {"num_layers": 30, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536},
    "350m": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 16, "intermediate_size": 2736},
    "360m": {"num_layers": 32, "hidden_size": 960, "num_heads": 15, "num_kv_heads": 5, "intermediate_size": 2560},
    "730m": {"num_layers": 26, "hidden_size": 1536, "num_heads": 24, "num_kv_heads": 8, "intermediate_size": 4096},
    "1.3b": {"num_layers": 24, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 32, "intermediate_size": 5504},
    "1.7b": {"num_layers": 24, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 32, "intermediate_size": 8192},
}

PRESETS = tuple(_SHAPES)


def preset(name: str, variant: Variant = "vanilla", recursions: int = 3, **overrides: Any) -> ModelConfig:
    """The configuration of a named size.

    Args:
        name: one of `PRESETS`.
        variant: `vanilla`; `recursive` (middle_cycle sharing, every token takes every step); `mor` (the same with
            expert-choice routing).
        recursions: R for the last two. Where R does not divide the preset's depth, the depth is rounded up as the paper
            does.
        overrides: fields of `ModelConfig` that replace the preset's.

    Raises:
        ConfigError: for an unknown preset or variant, or an override that makes the model impossible.
    """
    if name not in _SHAPES:
        raise ConfigError(f"model.preset: there is no {shown(name)}; choose one of {', '.join(PRESETS)}.")
    values: dict[str, Any] = {"vocab_size": 49_152, **_SHAPES[name]}  # SmolLM's
    if variant not in ("vanilla", "recursive", "mor"):
        raise ConfigError(f"model.variant: {shown(variant)} is not one of 'vanilla', 'recursive', 'mor'.")
    if variant != "vanilla":
        check_sizes(recursions=recursions)
        values["sharing"] = "middle_cycle"
        values["recursions"] = recursions
        values["num_layers"] = valid_depth(values["num_layers"], recursions, "middle_cycle")
    if variant == "mor":
        values["router"] = ExpertChoiceConfig()
    return ModelConfig.from_dict({**values, **overrides})
