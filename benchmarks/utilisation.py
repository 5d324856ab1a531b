"""Device utilisation in training: a search over activation checkpointing, micro-batch and compilation.

A step is a forward and a backward pass, gradient clipping and AdamW on fp32 master weights of a bf16 model. For each
checkpointing policy the micro-batch grows until memory is full or speed no longer improves; the best size is also
tried compiled. The training loop then trains the best setting of each model on one rank, and its recipe is printed.
Utilisation is model FLOPs (`mor_model.flops`, no recomputation) over the vendor's peak. If the peak is unknown, only
FLOPs per second are given.

    python -m benchmarks.utilisation --presets 135m 360m                        # one CUDA device
    python -m benchmarks.utilisation --device cpu --presets tiny --length 256 --largest 4 --not-compiled
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from benchmarks.recording import machine, record
from benchmarks.routing_overhead import Step, synchronize
from benchmarks.training_runs import median, recipe_of, records, train
from mor_model.activation_checkpointing import ActivationCheckpointing
from mor_model.flops import flops_per_sequence
from mor_model.presets import Variant, preset
from pretrain.training.engine import peak_flops

_GAIN = 1.01  # the search ends when a larger micro-batch gains less than this


class Training(Step):
    """A whole training step, with clipping and AdamW on fp32 copies of the bf16 weights."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weights: list[torch.Tensor] = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def seconds(self) -> float:
        synchronize(self.ids)
        began = time.perf_counter()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        synchronize(self.ids)
        return time.perf_counter() - began


def sizes(largest: int) -> Iterator[int]:
    """Powers of two and the numbers half-way between them: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    size = 1
    while size <= largest:
        yield size
        if size > 1 and size + size // 2 <= largest:
            yield size + size // 2
        size *= 2


def step_row(
    options: argparse.Namespace, name: str, variant: Variant, policy: ActivationCheckpointing, size: int, compiled: bool
) -> dict[str, Any] | None:
    """Measure one setting; None if it does not fit into the device's memory."""
    config = preset(name, variant, vocab_size=options.vocabulary, context_length=options.length)
    setting = argparse.Namespace(**vars(options), precision="bf16", batch=size, compile=compiled)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = None
    try:
        step = Training(config, setting, policy)
        for _ in range(options.warmup):
            step.seconds()
        seconds = statistics.median(step.seconds() for _ in range(options.steps))
    except torch.OutOfMemoryError:
        return None
    finally:
        del step
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
    flops = size * flops_per_sequence(config, options.length).training / seconds
    peak = peak_flops(device)
    return {
        "preset": name,
        "variant": variant,
        "policy": policy,
        "micro_batch": size,
        "compiled": compiled,
        "tokens_per_second": size * options.length / seconds,
        "flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def search(options: argparse.Namespace, name: str, variant: Variant) -> list[dict[str, Any]]:
    """Results of all settings tried for one model."""
    rows = []
    for policy in options.policies:
        best: dict[str, Any] | None = None
        for size in sizes(options.largest):
            row = step_row(options, name, variant, policy, size, compiled=False)
            if row is None:
                break
            rows.append(row)
            if best is not None and row["tokens_per_second"] < best["tokens_per_second"] * _GAIN:
                break
            best = row
        if best is not None and options.compiled:
            row = step_row(options, name, variant, policy, best["micro_batch"], compiled=True)
            rows += [row] if row else []
    return rows


def in_the_loop(options: argparse.Namespace, best: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train the best setting in the training loop; returns `best` with the loop's figures and the recipe."""
    model = {
        "preset": best["preset"],
        "variant": best["variant"],
        "vocab_size": options.vocabulary,
        "context_length": options.length,
    }
    values = recipe_of(
        folder / f"{best['preset']}-{best['variant']}",
        model,
        steps=options.steps + options.warmup,
        sequences=2 * best["micro_batch"],
        micro_batch=best["micro_batch"],
        precision="bf16",
        activation_checkpointing=best["policy"],
        compile=best["compiled"],
        deepspeed={"config": "zero1"},
    )
    visible = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"} if options.device == "cuda" else {}
    train(folder, values, 1, **visible)
    found = records(values)
    shown = {
        name: values[name]
        for name in ("model", "batch", "precision", "activation_checkpointing", "compile", "deepspeed")
    }
    return {
        **best,
        "loop_tokens_per_second": median(found, "tokens_per_second", options.warmup),
        "loop_mfu": median(found, "mfu", options.warmup) if found[0]["mfu"] is not None else None,
        "recipe": shown,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows, best = [], []
    for name in options.presets:
        for variant in options.variants:
            found = search(options, name, variant)
            if not found:
                continue
            rows += found
            best.append(in_the_loop(options, max(found, key=lambda row: row["tokens_per_second"]), folder))
    return {"rows": rows, "best": best, "options": vars(options), "machine": machine(options.device)}


def markdown(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """A table of all settings, and the best setting of each model with its recipe."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines = [
        f"bf16 with fp32 master weights, sequences of {options.length}, vocabulary {options.vocabulary}; "
        f"median of {options.steps} steps.",
        "",
        "| model | checkpointing | compiled | micro-batch | tokens/s | TFLOP/s | utilisation | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['preset']} {row['variant']} | {row['policy']} | {'yes' if row['compiled'] else 'no'} "
        f"| {row['micro_batch']} | {row['tokens_per_second']:.0f} | {row['flops_per_second'] / 1e12:.2f} "
        f"| {share(row['mfu'])} | {'' if row['peak_gib'] is None else format(row['peak_gib'], '.1f')} |"
        for row in result["rows"]
    ]
    for row in result["best"]:
        lines += [
            "",
            f"Best for {row['preset']} {row['variant']}: {row['tokens_per_second']:.0f} tokens/s "
            f"{share(row['mfu'])}; in the loop {row['loop_tokens_per_second']:.0f} tokens/s {share(row['loop_mfu'])}.",
            "",
            "```yaml",
            yaml.safe_dump(row["recipe"], sort_keys=False).strip(),
            "```",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--presets", nargs="+", default=["135m", "360m"])
    parser.add_argument("--variants", nargs="+", default=["vanilla", "mor"])
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=get_args(ActivationCheckpointing),
        default=list(get_args(ActivationCheckpointing)),
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--largest", type=int, default=256, help="largest micro-batch to try")
    parser.add_argument("--not-compiled", dest="compiled", action="store_false")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--name", default="")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="utilisation-") as folder:
        result = measure(options, Path(folder))
    record(options.name or f"utilisation-{options.device}", result, markdown(options, result))


if __name__ == "__main__":
    main()
