"""Activation checkpointing: what is kept for the backward pass, and what is computed again.

Only torch's non-reentrant API is used: with layers applied several times, the reentrant one silently loses gradients
under ZeRO. Nothing random happens inside a checkpointed region and routing decisions are inputs to it, so a
recomputation cannot decide differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mor_model.errors import ConfigError

ActivationCheckpointing = Literal["none", "recursion", "layer", "selective"]
Result = TypeVar("Result")
Run = Callable[..., Any]

_ATTENTION_OPERATORS = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
}


def check_policy(policy: str) -> None:
    if policy not in get_args(ActivationCheckpointing):
        known = ", ".join(get_args(ActivationCheckpointing))
        raise ConfigError(f"activation_checkpointing: {policy!r} is not one of {known}.")


def _keep_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.__name__.split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in _ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def _call(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_selective = partial(_checkpoint, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))


def step_runner(policy: ActivationCheckpointing) -> Run:
    """How a recursion step is called: `run(function, *args)`. `recursion` keeps only the step's input."""
    return _checkpoint if policy == "recursion" and torch.is_grad_enabled() else _call


def layer_runner(policy: ActivationCheckpointing) -> Run:
    """How a layer is called. `layer` keeps its input; `selective` also keeps the attention output, which costs most to
    compute again and little to keep."""
    if not torch.is_grad_enabled():
        return _call
    return {"layer": _checkpoint, "selective": _selective}.get(policy, _call)
