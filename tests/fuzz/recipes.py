"""Recipes that say something in every section, to be fuzzed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pretrain.recipe.yaml_input import write_yaml
from tests.fuzz.support import ODD_VALUES, leaves, mutate_text
from tests.pretrain.support import recipe_values, tiny_model

PLAIN = recipe_values(Path("data"), Path("run"))
FULL: dict[str, Any] = {
    **PLAIN,
    "initial_weights": "weights",
    "data": {
        "sources": [{"path": "a", "weight": 2, "final_weight": 0.5}, {"path": "b", "subset": "B", "name": "b"}],
        "anneal": 0.2,
        "packing": "concat",
        "verify": "structure",
        "skip_samples": [[1, 2], [5, 9]],
    },
    "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1},
    "schedule": {"kind": "wsd", "warmup": {"tokens": 2560}, "decay": 0.2, "decay_shape": "1-sqrt", "floor": 0.1},
    "budget": {"flops": 1e10, "branches": [5e9]},
    "batch": {"sequences": 8, "micro_batch": 2, "sequence_length": 32, "warmup_from": 4, "warmup": 0.1},
    "compile": False,
    "capacity_warmup": {"length": 0.1},
    "checkpoint": {"every": 4, "every_minutes": 5, "keep": 2, "keep_every": {"flops": 1e9}, "log_spaced": True},
    "evaluation": {"every": 6, "sequences": 6, "max_share": 0.1, "suites": {"names": ["own"], "limit": 5}},
    "logging": {"every": 1, "wandb": "offline", "wandb_project": "p", "tensorboard": True},
    "faults": {"max_non_finite": 3, "spike": 2.5, "spike_window": 20, "on_spike": "rollback"},
    "limits": {"wall_clock_hours": 2, "stall_seconds": 600},
}
STAGED: dict[str, Any] = {
    **PLAIN,
    "model": {"preset": "tiny", "variant": "mor", "recursions": 3, "context_length": 64, "norm_eps": 1e-6},
    "data": {
        "sources": [{"path": "a"}, {"path": "b"}],
        "phases": [{"start": 3, "weights": {"a": 1}}, {"start": {"tokens": 2000}, "weights": {"b": 1}}],
    },
    "depth_warmup": {"length": 4},
}
ROUTED: dict[str, Any] = {
    **PLAIN,
    "model": tiny_model(
        router={"kind": "expert_choice", "capacities": [1, 0.5, 0.25], "network": "mlp", "alpha": 0.1, "z_loss": 1e-4},
        kv_sharing="shared",
        rope_theta=1e4,
    ),
}
RECIPES = [PLAIN, FULL, STAGED, ROUTED]


def override(values: dict[str, Any], source: random.Random) -> str:
    """`key=value` for a key or section in `values`, with its own value or an odd one; sometimes damaged."""
    path, value = source.choice(list(leaves(values).items()))
    key = ".".join(path[: source.randint(1, len(path))])
    if source.random() < 0.5:
        value = source.choice(ODD_VALUES)
    text = f"{key}={write_yaml(value).removesuffix(chr(10)).removesuffix('...').removesuffix(chr(10))}"
    return mutate_text(text, source) if source.random() < 0.5 else text
