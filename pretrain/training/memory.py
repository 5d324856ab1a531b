"""How much memory a rank will need, from the recipe alone: nothing is built that takes any.

What stays is arithmetic (Rajbhandari et al. 2020, arXiv 1910.02054, section 3, and what DeepSpeed copies in an update,
as measured); what a forward and a backward pass hold at most is followed, storage by storage, through one micro-batch
whose tensors have no memory behind them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mor_model import RecursiveTransformer
from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from mor_model.flops import count_parameters
from pretrain.recipe.deepspeed_json import offload_device, zero_stage
from pretrain.recipe.recipe import Recipe
from pretrain.training.muon import is_hidden_matrix, iterated_in, orthogonal_update, stacked_rows

_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_autocast": 4}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.float32}
_MASTER, _MOMENTS = 4, 8
# Muon keeps no second moment, and copies the momentum that it orthogonalises.
_SECOND_MOMENT, _WANTED = 4, 4
# What Python modules that are loaded while the engine is built take; they count on a CPU, whose memory they share.
_LIBRARIES = 120 << 20


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the device of one rank.

    Attributes:
        weights, gradients, optimizer: what stays from step to step; the optimiser has master weights and moments.
        passes: most that a forward and a backward pass hold beside it: activations, gathered weights, buckets.
        update: most that an optimiser step holds beside it.
        libraries: code that is loaded after the start.
    """

    weights: int
    gradients: int
    optimizer: int
    passes: int
    update: int
    libraries: int

    @property
    def total(self) -> int:
        """The peak: passes and update follow each other."""
        return self.weights + self.gradients + self.optimizer + max(self.passes, self.update) + self.libraries


class Passes(NamedTuple):
    """Most bytes alive during forward and backward pass of one micro-batch, without weights.

    Attributes:
        peak: with gradients gone as soon as they are complete; peak_with_gradients: with gradients that stay.
    """

    peak: int
    peak_with_gradients: int


def estimate_memory(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    world_size: int,
    *,
    on_cpu: bool,
    passes: Passes | None = None,
) -> Memory:
    """Bytes that training needs on the device of one of `world_size` ranks.

    Args:
        recipe: with its precision resolved.
        ds_config: what `resolve_ds_config` returned.
        on_cpu: the device is a CPU.
        passes: what `peak_of_passes` found, None follows them now (seconds).
    """
    config = recipe.network
    count = count_parameters(config).total_stored
    zero = ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    width = _WIDTHS[recipe.precision]
    share = -(-count // world_size)
    accumulation = (ds_config.get("data_types") or {}).get("grad_accum_dtype")
    gradient_width = 4 if accumulation == "fp32" else width
    # Gradients of the partition are put together, and put into fp32 where they are not.
    upcast = gradient_width + (4 if gradient_width < 4 else 0)
    update = share * upcast
    gradients = gradient_width * (share if stage >= 2 else count)
    weights = width * (share if stage == 3 else count)
    optimizer = (_MASTER + _MOMENTS) * share
    followed = peak_of_passes(recipe) if passes is None else passes
    in_passes = followed.peak
    if stage < 2 and recipe.batch.sequences == recipe.batch.micro_batch * world_size:
        # With one micro-batch a step gradients come as activations go.
        in_passes = followed.peak_with_gradients - gradients
    if stage:
        in_passes += width * min(count, int(zero.get("reduce_bucket_size", 500_000_000)))
    else:
        optimizer, update = _MOMENTS * count, 0
    if recipe.optim.name == "muon":
        hidden, orthogonal = _followed_muon(config, on_cpu)
        part = -(-hidden // world_size) if stage else hidden
        optimizer -= _SECOND_MOMENT * part
        update = orthogonal
        if stage:
            # Muon's parameter group is updated separately, with a copy of its momentum.
            update = max((upcast + _WANTED) * part + orthogonal, upcast * (share - part))
    if stage == 3 and world_size > 1:
        in_passes += width * min(count, int(zero.get("stage3_max_live_parameters", 1_000_000_000)))
    if offload_device(ds_config, "offload_optimizer") != "none" and not on_cpu:
        optimizer = gradients = update = 0
    if offload_device(ds_config, "offload_param") != "none" and not on_cpu:
        weights = 0
    return Memory(weights, gradients, optimizer, in_passes, update, _LIBRARIES if on_cpu else 0)


def _followed_muon(config: ModelConfig, on_cpu: bool) -> tuple[int, int]:
    """Elements of all matrices that Muon updates, and most bytes alive while it makes one of them orthogonal."""
    with torch.device("meta"):
        named = list(RecursiveTransformer(config).named_parameters())
    hidden = [(p.shape, stacked_rows(n, p.shape, config)) for n, p in named if is_hidden_matrix(n, p.shape)]
    peak = 0
    with FakeTensorMode():
        for shape, rows in set(hidden):
            with _LiveBytes(set()) as live:
                orthogonal_update(torch.zeros(shape, dtype=iterated_in(on_cpu=on_cpu)), rows)
            peak = max(peak, live.peak)
    return sum(shape.numel() for shape, _ in hidden), peak


def peak_of_passes(recipe: Recipe) -> Passes:
    """Follow forward and backward pass of one micro-batch.

    How many tokens token-choice takes on is decided by data, of which there is none: it is followed as if a step took
    the share of the sequence that a plan assumes.
    """
    config = recipe.network
    if isinstance(config.router, TokenChoiceConfig):
        config = replace(config, router=ExpertChoiceConfig(capacities=config.capacities))
    batch, length = recipe.batch.micro_batch, recipe.batch.sequence_length
    usual = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[recipe.precision])
    try:
        with FakeTensorMode():
            model = RecursiveTransformer(config, activation_checkpointing=recipe.activation_checkpointing)
            live = _LiveBytes({p.untyped_storage()._cdata for p in model.parameters()})
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(live.drop_gradient)
            tokens = torch.zeros(batch, length, dtype=torch.long)
            documents = torch.zeros_like(tokens) if config.document_masking else None
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16_autocast")
            with live, autocast:
                loss = model(tokens, tokens, documents_BT=documents).loss
                assert loss is not None
                loss.backward()
    finally:
        torch.set_default_dtype(usual)
    return Passes(live.peak, live.peak_with_dropped)


def format_bytes(size: int) -> str:
    """A size for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make inside the context: alive now, and at the peak, also if gradients that
    were dropped had stayed. torch's MemTracker finds the same peak, which the tests compare, but takes eight times as
    long: 27 s for a model of 135M parameters instead of 3 s, before every start with `deepspeed.config: auto`.
    """

    def __init__(self, apart: set[int]) -> None:
        """`apart`: storages that are not counted."""
        super().__init__()
        self.now = self.peak = self.dropped = self.peak_with_dropped = 0
        self._known = apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    self.peak_with_dropped = max(self.peak_with_dropped, self.now + self.dropped)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def drop_gradient(self, parameter: torch.Tensor) -> None:
        """Let go of a gradient and remember its size; a hook for when it is complete."""
        assert parameter.grad is not None
        self.dropped += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
