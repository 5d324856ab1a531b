"""The optimiser: which parameters decay, at which learning rate, with which kernel."""

from __future__ import annotations

from typing import Any

import torch

from mor_model import RecursiveTransformer
from pretrain.recipe.schedules import LearningRate
from pretrain.recipe.sections import Optim
from pretrain.training.muon import Muon, is_hidden_matrix, stacked_rows


def parameter_groups(model: RecursiveTransformer, optim: Optim) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors (norm scales, biases), which do not; Muon's matrices
    come first, with their momentum.

    Every group's `lr` is its peak, which `Scheduler` multiplies by the schedule's factor each step. A parameter that
    several modules share counts once.
    """
    hidden: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if optim.name == "muon" and is_hidden_matrix(name, shape):
            hidden.append(parameter)
        else:
            (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [
        {"params": hidden, "weight_decay": optim.weight_decay, "lr": optim.lr, "momentum": optim.momentum},
        {"params": matrices, "weight_decay": optim.weight_decay, "lr": optim.lr},
        {"params": vectors, "weight_decay": 0.0, "lr": optim.lr},
    ]
    return [group for group in groups if group["params"]]


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter. Under ZeRO-3 a partitioned one is empty; its own shape is kept beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_optimizer(model: RecursiveTransformer, optim: Optim, *, offloaded: bool) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`: Muon, or AdamW with torch's fused kernel, or with DeepSpeed's
    CPU kernel where optimiser states are offloaded.
    """
    groups = parameter_groups(model, optim)
    if optim.name == "muon":
        rows = {
            id(parameter): stacked_rows(name, full_shape(parameter), model.config)
            for name, parameter in model.named_parameters()
            if is_hidden_matrix(name, full_shape(parameter))
        }
        return Muon(groups, rows, betas=optim.betas, eps=optim.eps)
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adam = DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
        adam.register_step_pre_hook(_forget_powers)
        return adam
    # Passing the op's own AdamW in the JSON would compile a kernel for over a minute; torch's needs no build.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _forget_powers(adam: Any, *_: Any) -> None:
    """DeepSpeed's kernel keeps beta to the power of the step, multiplied on from step to step, and computes it anew
    after a resume, which rounds differently. A new kernel object for each step always computes it anew.
    """
    beta1, beta2 = adam.defaults["betas"]
    settings = (adam.defaults["lr"], beta1, beta2, adam.defaults["eps"], adam.defaults["weight_decay"])
    adam.ds_opt_adam.destroy_adam(adam.opt_id)
    adam.ds_opt_adam.create_adam(adam.opt_id, *settings, adam.adam_w_mode, False)


class Scheduler:
    """Sets the learning rate of every parameter group before an update: its peak times the plan's factor.

    torch's schedulers count their own steps and are stored with a checkpoint. This one is a function of the step
    number, so a resumed run needs no state of it.

    Args:
        optimizer: whose groups hold their peak learning rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: LearningRate) -> None:
        # Kept apart, because loading a checkpoint overwrites the groups.
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._rate = rate
        self._optimizer: Any = optimizer

    def follow(self, optimizer: Any) -> None:
        """Set the rates of DeepSpeed's wrapper of the optimiser, which has the same groups."""
        self._optimizer = optimizer

    def set(self, step: int) -> None:
        """Set the rates for update number `step`, counted from 0."""
        factor = self._rate.factor(step)
        for group, peak in zip(self._optimizer.param_groups, self._peaks):
            group["lr"] = peak * factor

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group."""
        return [group["lr"] for group in self._optimizer.param_groups]
