"""Memory and time of each activation checkpointing policy.

`kept` is what is alive between the forward and the backward pass, `peak` the maximum during the step. Both exclude
parameters and include gradients. On a GPU they come from the allocator's counters. On a CPU every storage is tracked,
which is exact but slow, so the time is measured on separate steps.

    python -m benchmarks.activation_memory                         # a CPU
    python -m benchmarks.activation_memory --device cuda --preset 360m --batch 16 --length 2048
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, get_args

import torch

from benchmarks.recording import machine, record, restart_with_steady_heap
from benchmarks.routing_overhead import Step
from mor_model.activation_checkpointing import ActivationCheckpointing
from mor_model.presets import preset
from tests.mor_model.live_memory import LiveBytes

MIB = 2**20


def bytes_of_step(step: Step) -> tuple[float, float]:
    """(kept, peak) in MiB."""
    step.model.zero_grad()
    if not step.ids.is_cuda:
        with LiveBytes() as live:
            loss = step.loss()
            kept = live.now
            loss.backward()
        return kept / MIB, live.peak / MIB
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = step.loss()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    return kept / MIB, (torch.cuda.max_memory_allocated() - before) / MIB


def measure(options: argparse.Namespace) -> dict[str, Any]:
    size = {"recursions": options.recursions, "vocab_size": options.vocabulary, "context_length": options.length}
    rows = []
    configs = {
        "unrouted": preset(options.preset, "recursive", **size),
        "MoR": preset(options.preset, "mor", **size),
    }
    for name, config in configs.items():
        for policy in get_args(ActivationCheckpointing):
            step = Step(config, options, policy)
            step.seconds()
            seconds = statistics.median(step.seconds() for _ in range(options.rounds))
            kept, peak = bytes_of_step(step)
            rows.append({"model": name, "policy": policy, "kept_mib": kept, "peak_mib": peak, "seconds": seconds})
    return {"rows": rows, "options": vars(options), "machine": machine(options.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--precision", choices=("bf16", "autocast", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.compile = False
    if options.device == "cpu":
        restart_with_steady_heap()
    result = measure(options)
    table = (
        f"{options.preset}, R={options.recursions}, {options.batch} x {options.length} tokens, vocabulary "
        f"{options.vocabulary}, {options.precision}; MiB, and seconds of a forward and a backward pass.\n\n"
        "| model | checkpointing | kept | peak | seconds |\n|---|---|---|---|---|\n"
        + "\n".join(
            "| {model} | {policy} | {kept_mib:.0f} | {peak_mib:.0f} | {seconds:.2f} |".format(**row)
            for row in result["rows"]
        )
    )
    record(f"activation_memory-{options.device}", result, table)


if __name__ == "__main__":
    main()
