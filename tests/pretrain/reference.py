"""Training as a few lines of plain PyTorch in one process, to hold the DeepSpeed loop against."""

from __future__ import annotations

from typing import Any

import torch

from data_prep.dataset import open_dataset
from data_prep.mixture import Mixture, MixtureSource, Phase
from mor_model import RecursiveTransformer
from pretrain.recipe import build_recipe


def plain_losses(values: dict[str, Any]) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step, and the final weights, of a recipe with a budget in steps.

    The whole batch is one forward pass; learning rate, clipping and decay groups are written out.
    """
    recipe = build_recipe(values)
    config = recipe.network()
    model = RecursiveTransformer(config)
    model.initialize(recipe.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
    )
    length, size, steps = recipe.batch.sequence_length, recipe.batch.sequences, recipe.budget.steps
    assert recipe.data.path is not None and steps is not None
    warmup, decay = recipe.schedule.warmup, recipe.schedule.decay
    assert isinstance(warmup, int) and isinstance(decay, int)
    data = Mixture(
        [MixtureSource("data", open_dataset(recipe.data.path))], length, [Phase(0, {"data": 1.0})], recipe.seed
    )
    losses, norms = [], []
    for step in range(steps):
        tokens = torch.from_numpy(data.batch(step * size, size).astype("int64"))
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)))
        rate = min(1.0, (step + 1) / warmup, (steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {name: value.detach() for name, value in model.state_dict().items()}
