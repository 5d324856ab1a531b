"""Vanilla models in the names and shapes of transformers' Llama, both ways.

A vanilla network (every layer applied once, no router) is the Llama architecture: the same functions in the same order,
with the query, key and value matrices stacked into one, and the feed-forward's gate and value matrices likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError, shown

State = dict[str, Tensor]

# Ours -> Llama's, for what is stored one to one.
_OUTER = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
# Ours -> Llama's, for what is stacked along the rows.
_STACKED = {
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def is_llama(config: ModelConfig) -> bool:
    """True when the network applies each stored layer once, in order, and routes nothing."""
    schedule = config.schedule
    return config.router is None and schedule.applications == tuple(range(schedule.num_stored))


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' `LlamaConfig` for a vanilla network.

    The rotary base is written under both names, `rope_theta` (transformers 4) and `rope_parameters` (5).
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def config_from_llama(values: dict[str, Any], where: str) -> ModelConfig:
    """The vanilla configuration of a Llama `config.json`.

    Args:
        values: the file's contents.
        where: its name, for messages.

    Raises:
        ConfigError: for another architecture, or a Llama with a part this network does not have (biases, scaled rotary
            positions, another activation).
    """
    if values.get("model_type") != "llama":
        raise ConfigError(
            f"{where}: model_type is {shown(values.get('model_type'))}; only checkpoints of the Llama architecture "
            "(model_type 'llama') can be imported."
        )
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ConfigError(
                f"{where}: {name} is set, but this network has no biases; the checkpoint does not fit it."
            )
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{where}: hidden_act is {shown(activation)}; only 'silu' (SwiGLU) fits this network.")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: the rotary positions are {shown(rope)}; expected a JSON object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rotary positions are scaled ({shown(kind)}); only unscaled ones ('default') fit.")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; it is not a complete Llama configuration.")
    try:
        return ModelConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            intermediate_size=values["intermediate_size"],
            head_dim=values.get("head_dim"),
            context_length=values.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta") or values.get("rope_theta") or 10_000.0,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            init_std=values.get("initializer_range", 0.02),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_llama(state: State, config: ModelConfig) -> State:
    """Weights of a vanilla network under Llama's names; slices share memory with `state`. Tied heads are left out."""
    heads, kv_heads = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    rows = {
        "attention.qkv.weight": (heads, kv_heads, kv_heads),
        "feed_forward.gate_up.weight": (config.intermediate_size,) * 2,
    }
    llama = {theirs: state[ours] for ours, theirs in _OUTER.items()}
    if not config.tie_embeddings:
        llama["lm_head.weight"] = state["head.weight"]
    for layer in range(config.num_layers):
        for ours, theirs in _IN_LAYER.items():
            llama[f"model.layers.{layer}.{theirs}"] = state[f"layers.{layer}.{ours}"]
        for ours, parts in _STACKED.items():
            for theirs, part in zip(parts, state[f"layers.{layer}.{ours}"].split(rows[ours])):
                llama[f"model.layers.{layer}.{theirs}"] = part
    return llama


def from_llama(llama: State, config: ModelConfig, where: str) -> State:
    """Llama's weights under this network's names.

    Args:
        llama: every tensor of the checkpoint.
        config: what `config_from_llama` made of its configuration.
        where: the checkpoint's name, for messages.

    Raises:
        ConfigError: when a tensor is missing, has another shape than the configuration says, or has no place here.
    """
    left = {name: value for name, value in llama.items() if not name.endswith("rotary_emb.inv_freq")}
    width, head_width = config.hidden_size, config.head_width
    shapes = {
        "self_attn.q_proj.weight": (config.num_heads * head_width, width),
        "self_attn.k_proj.weight": (config.num_kv_heads * head_width, width),
        "self_attn.v_proj.weight": (config.num_kv_heads * head_width, width),
        "self_attn.o_proj.weight": (width, config.num_heads * head_width),
        "mlp.gate_proj.weight": (config.intermediate_size, width),
        "mlp.up_proj.weight": (config.intermediate_size, width),
        "mlp.down_proj.weight": (width, config.intermediate_size),
    }

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in left:
            raise ConfigError(f"{where}: tensor {name} is missing; the checkpoint is incomplete or not a Llama.")
        tensor = left.pop(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}, its configuration says {shape}."
            )
        return tensor

    embedding = (config.vocab_size, width)
    state = {ours: take(theirs, embedding if "embed" in theirs else (width,)) for ours, theirs in _OUTER.items()}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    else:
        state["head.weight"] = take("lm_head.weight", embedding)
    for layer in range(config.num_layers):
        for ours, theirs in _IN_LAYER.items():
            state[f"layers.{layer}.{ours}"] = take(f"model.layers.{layer}.{theirs}", shapes.get(theirs, (width,)))
        for ours, parts in _STACKED.items():
            taken = [take(f"model.layers.{layer}.{theirs}", shapes[theirs]) for theirs in parts]
            state[f"layers.{layer}.{ours}"] = torch.cat(taken)
    if left:
        raise ConfigError(
            f"{where}: tensor {shown(next(iter(left)))} has no place in this network; the checkpoint does not fit."
        )
    return state
