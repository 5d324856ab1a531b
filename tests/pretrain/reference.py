"""Training as a few lines of plain PyTorch in one process, to hold the DeepSpeed loop against."""

from __future__ import annotations

from typing import Any

import torch

from data_prep.reading.dataset import open_dataset
from data_prep.reading.mixture import Mixture, MixtureSource, Phase
from data_prep.reading.packed import PackedDataset, is_padding
from mor_model import RecursiveTransformer
from mor_model.config import ModelConfig
from pretrain.recipe.recipe import build_recipe


def plain_losses(values: dict[str, Any]) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step, and the final weights, of a recipe with a budget in steps.

    The whole batch is one forward pass; learning rate, clipping and decay groups are written out.
    """
    recipe = build_recipe(values)
    config = recipe.network
    model = RecursiveTransformer(config)
    model.initialize(recipe.seed)
    hidden = {
        n: p for n, p in model.named_parameters() if recipe.optim.name == "muon" and n[:6] == "layers" and p.dim() == 2
    }
    momenta = {name: torch.zeros_like(parameter) for name, parameter in hidden.items()}
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and n not in hidden]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
    )
    length, steps = recipe.batch.sequence_length, recipe.budget.steps
    assert recipe.data.path is not None and steps is not None
    warmup, decay = recipe.schedule.warmup, recipe.schedule.decay
    assert isinstance(warmup, int) and isinstance(decay, int)
    dataset = open_dataset(recipe.data.path)
    packed = PackedDataset(dataset, length) if recipe.data.packing == "best-fit" else None
    data = Mixture([MixtureSource("data", packed or dataset)], length, [Phase(0, {"data": 1.0})], recipe.seed)
    losses, norms, position = [], [], 0
    for step in range(steps):
        size = recipe.batch.sequences
        if recipe.batch.warmup_from is not None:
            growing = recipe.batch.warmup
            assert isinstance(growing, int) and size == 4 * recipe.batch.warmup_from
            size = size // 4 if step < growing / 2 else size // 2 if step < growing else size
        tokens = torch.from_numpy(data.batch(position, size).astype("int64"))
        position += size
        depth = None
        if recipe.depth_warmup is not None:
            growing = recipe.depth_warmup.length
            assert isinstance(growing, int) and config.recursions == 3
            depth = 1 if step < growing / 2 else 2 if step < growing else None
        inputs, labels, more = tokens[:, :-1], tokens[:, 1:], {}
        if config.document_masking:
            ends = (inputs == dataset.eod_id).long()
            more["documents_BT"] = ends.cumsum(1) - ends
        if packed is not None:
            padding = torch.from_numpy(is_padding(tokens.numpy(), packed.eod_id))
            labels = labels.masked_fill(padding[:, 1:], -100)
            more["valid_BT"] = ~(padding[:, :-1] & padding[:, 1:])
        loss = model(inputs, labels, depth=depth, **more).loss
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)))
        rate = min(1.0, (step + 1) / warmup, (steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr * rate
        optimizer.step()
        with torch.no_grad():
            for name, parameter in hidden.items():
                gradient, beta = parameter.grad, recipe.optim.momentum
                momenta[name] = beta * momenta[name] + (1 - beta) * gradient
                looked_ahead = beta * momenta[name] + (1 - beta) * gradient
                parameter *= 1 - recipe.optim.lr * rate * recipe.optim.weight_decay
                parameter -= recipe.optim.lr * rate * plain_muon(looked_ahead, rows_of_maps(name, config))
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {name: value.detach() for name, value in model.state_dict().items()}


def rows_of_maps(name: str, config: ModelConfig) -> list[int]:
    """Rows of queries, keys and values, of gate and values; everything else is one map."""
    width = config.hidden_size // config.num_heads
    return {
        "qkv": [config.num_heads * width, config.num_kv_heads * width, config.num_kv_heads * width],
        "gate_up": [config.intermediate_size] * 2,
    }.get(name.split(".")[-2], [])


def plain_muon(gradient: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Muon's update in float64: every stacked map made orthogonal by five Newton-Schulz steps, at AdamW's size."""
    done, start = [], 0
    for count in rows or [gradient.shape[0]]:
        x = gradient[start : start + count].double()
        start += count
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        done.append(0.2 * max(x.shape) ** 0.5 * x)
    return torch.cat(done).to(gradient.dtype)
