"""Training speed of the vanilla network compared with transformers' Llama: the same weights and the same batch.

A step is a forward pass with loss and a backward pass; the optimiser updates the same number of parameters in both.
Both use scaled-dot-product attention, without checkpointing and with checkpointing of every layer (each library's
own). The two take turns in one process, so other work on the machine slows both alike; the median of the rounds'
ratios is reported. Loss and gradients are compared before timing.

    python -m benchmarks.vanilla_vs_llama                          # a CPU
    python -m benchmarks.vanilla_vs_llama --device cuda --preset 360m --batch 16 --length 2048 --compile
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.recording import machine, record, restart_with_steady_heap
from benchmarks.routing_overhead import synchronize
from mor_model.config import ModelConfig
from mor_model.flops import flops_per_sequence
from mor_model.hub.llama import llama_config, to_llama
from mor_model.model import RecursiveTransformer
from mor_model.presets import preset

Loss = Callable[[Tensor, Tensor], Tensor]


def networks(config: ModelConfig, checkpointed: bool, options: argparse.Namespace) -> dict[str, tuple[nn.Module, Loss]]:
    """Both networks with the same weights, each with its loss of (ids, labels)."""
    ours = RecursiveTransformer(config, "layer" if checkpointed else "none")
    ours.initialize(0)
    llama = LlamaForCausalLM(
        LlamaConfig(**(llama_config(config) | {"attn_implementation": "sdpa", "use_cache": False}))
    )
    llama.load_state_dict(to_llama(ours.state_dict(), config), strict=False)
    llama.tie_weights()
    if checkpointed:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    ours.to(options.device).train()
    llama.to(options.device).train()
    call_ours, call_llama = (torch.compile(ours), torch.compile(llama)) if options.compile else (ours, llama)
    return {
        "ours": (ours, lambda ids, labels: call_ours(ids, labels).loss),
        "llama": (llama, lambda ids, labels: call_llama(input_ids=ids, labels=labels, shift_labels=labels).loss),
    }


def step(network: nn.Module, loss: Loss, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """(seconds, loss) of a forward and a backward pass under bf16 autocast."""
    network.zero_grad()
    synchronize(ids)
    start = time.perf_counter()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        value = loss(ids, labels)
    value.backward()
    synchronize(ids)
    return time.perf_counter() - start, float(value.detach())


def gradient_norm(network: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


def compare(config: ModelConfig, checkpointed: bool, options: argparse.Namespace) -> dict[str, Any]:
    models = networks(config, checkpointed, options)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(config.vocab_size, (options.batch, options.length + 1), generator=generator)
    ids, labels = (part.contiguous().to(options.device) for part in (stream[:, :-1], stream[:, 1:]))
    losses = {name: step(*model, ids, labels)[1] for name, model in models.items()}
    norms = {name: gradient_norm(network) for name, (network, _) in models.items()}
    if abs(losses["ours"] - losses["llama"]) > 0.01 or abs(norms["ours"] / norms["llama"] - 1) > 0.02:
        raise SystemExit(f"the networks differ, so their speeds do not compare: losses {losses}, norms {norms}")
    for _ in range(options.warmup):
        for model in models.values():
            step(*model, ids, labels)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = list(models) if number % 2 else list(models)[::-1]
        rounds.append({name: step(*models[name], ids, labels)[0] for name in order})
    tokens = ids.numel()
    return {
        "tokens_per_second": {name: tokens / statistics.median(row[name] for row in rounds) for name in models},
        "ratio": statistics.median(row["llama"] / row["ours"] for row in rounds),
        "losses": losses,
        "gradient_norms": norms,
        "rounds": rounds,
    }


def utilisation(config: ModelConfig, tokens_per_second: float, options: argparse.Namespace) -> float | None:
    """Model FLOPs over the GPU's peak; None if that is unknown."""
    if options.device != "cuda":
        return None
    from pretrain.training.engine import peak_flops

    peak = peak_flops(torch.device("cuda"))
    per_token = flops_per_sequence(config, options.length).training / options.length
    return None if peak is None else per_token * tokens_per_second / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.device == "cpu":
        restart_with_steady_heap()
    config = preset(options.preset, vocab_size=options.vocabulary, context_length=options.length)
    rows = {}
    for name, checkpointed in {"none": False, "every layer": True}.items():
        rows[name] = compare(config, checkpointed, options)
        rows[name]["mfu"] = utilisation(config, rows[name]["tokens_per_second"]["ours"], options)
    table = (
        f"{options.preset} vanilla, {options.batch} x {options.length} tokens, vocabulary {options.vocabulary}, bf16 "
        f"autocast{', compiled' if options.compile else ''}; forward and backward, median of {options.rounds} rounds; "
        f"transformers {version('transformers')}.\n\n"
        "| checkpointing | ours, tokens/s | Llama, tokens/s | ours over Llama | MFU of ours |\n|---|---|---|---|---|\n"
    )
    for name, row in rows.items():
        speed, mfu = row["tokens_per_second"], row["mfu"]
        table += f"| {name} | {speed['ours']:,.0f} | {speed['llama']:,.0f} | **{row['ratio']:.3f}** | "
        table += "- |\n" if mfu is None else f"{mfu:.1%} |\n"
    described = {**machine(options.device), "transformers": version("transformers")}
    suffix = "-compiled" if options.compile else ""
    result = {"activation_checkpointing": rows, "options": vars(options), "machine": described}
    record(f"vanilla_vs_llama-{options.device}{suffix}", result, table)


if __name__ == "__main__":
    main()
