"""Overhead of routing beyond its arithmetic: time ratio of MoR to the unrouted model, divided by their FLOPs ratio.

1.00 means that skipping tokens saves exactly what the FLOPs say. Both models have the same layers. They take turns in
one process, so other work on the machine slows both alike; the median of the rounds' ratios is reported. A step is a
forward and a backward pass: the optimiser updates the same parameters in both.

    python -m benchmarks.routing_overhead                          # a CPU
    python -m benchmarks.routing_overhead --device cuda --preset 360m --batch 16 --length 2048 --compile
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.recording import machine, record, restart_with_steady_heap
from mor_model.activation_checkpointing import ActivationCheckpointing
from mor_model.config import ModelConfig
from mor_model.flops import flops_per_sequence
from mor_model.model import RecursiveTransformer
from mor_model.presets import preset


class Step:
    """A training step of one model on one batch."""

    def __init__(
        self,
        config: ModelConfig,
        options: argparse.Namespace,
        policy: ActivationCheckpointing = "none",
    ) -> None:
        self.autocast = options.precision == "autocast"
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        self.model = RecursiveTransformer(config, policy)
        self.model.initialize(0)
        self.model.to(device=options.device, dtype=dtype)
        self.call = torch.compile(self.model, fullgraph=True) if options.compile else self.model
        generator = torch.Generator().manual_seed(0)
        stream = torch.randint(config.vocab_size, (options.batch, options.length + 1), generator=generator)
        self.ids, self.labels = stream[:, :-1].to(options.device), stream[:, 1:].to(options.device)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss: torch.Tensor = self.call(self.ids, self.labels).loss
        return loss

    def seconds(self) -> float:
        self.model.zero_grad()
        synchronize(self.ids)
        start = time.perf_counter()
        self.loss().backward()
        synchronize(self.ids)
        return time.perf_counter() - start


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    size = {"recursions": options.recursions, "vocab_size": options.vocabulary, "context_length": options.length}
    configs = {
        "unrouted": preset(options.preset, "recursive", **size),
        "MoR": preset(options.preset, "mor", **size),
    }
    steps = {name: Step(config, options) for name, config in configs.items()}
    for _ in range(options.warmup):
        for step in steps.values():
            step.seconds()
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        rounds.append({name: steps[name].seconds() for name in order})
    flops = {name: flops_per_sequence(config, options.length).training for name, config in configs.items()}
    ratios = [row["MoR"] / row["unrouted"] for row in rounds]
    time_ratio = statistics.median(ratios)
    lower, _, upper = statistics.quantiles(ratios, n=4)
    flops_ratio = flops["MoR"] / flops["unrouted"]
    return {
        "seconds": {name: statistics.median(row[name] for row in rounds) for name in steps},
        "time_ratio": time_ratio,
        "flops_ratio": flops_ratio,
        "overhead": time_ratio / flops_ratio,
        "overhead_quartiles": [lower / flops_ratio, upper / flops_ratio],
        "rounds": rounds,
        "options": vars(options),
        "machine": machine(options.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--precision", choices=("bf16", "autocast", "fp32"), default="autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.device == "cpu":
        restart_with_steady_heap()
    result = measure(options)
    table = (
        f"{options.preset}, R={options.recursions}, {options.batch} x {options.length} tokens, vocabulary "
        f"{options.vocabulary}, {options.precision}{', compiled' if options.compile else ''}; forward and backward, "
        f"median of {options.rounds} rounds.\n\n"
        "| model | seconds |\n|---|---|\n"
        + "".join(f"| {name} | {seconds:.4f} |\n" for name, seconds in result["seconds"].items())
        + f"\nTime ratio {result['time_ratio']:.3f}, FLOPs ratio {result['flops_ratio']:.3f}: "
        f"**overhead {result['overhead']:.3f}** (1 is ideal; quartiles of the rounds "
        "{:.3f} and {:.3f}).".format(*result["overhead_quartiles"])
    )
    record(f"routing_overhead-{options.device}", result, table)


if __name__ == "__main__":
    main()
