"""Time and memory of a step at each ZeRO stage, on the ranks of this machine.

On a CPU all ranks share the cores, so the times show the cost of partitioning, not what several devices gain. Memory
is the peak of a rank minus what the process held before the network was built. It is measured in a separate run whose
allocator returns freed memory at once, so that the resident size is what is alive. The estimate of `--dry-run` is
given beside it.

    python -m benchmarks.zero_stages --ranks 2
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.training_runs import GIVE_BACK, median, network, parser, recipe_of, records, run, train

PARTS = ("forward", "backward", "optimizer", "communication", "data")


def estimated_mib(folder: Path, values: dict[str, Any], ranks: int) -> float:
    """MiB per rank that a dry run estimates."""
    printed = train(folder, values, ranks, "--dry-run")
    found = re.search(r"memory +about ([0-9.]+) (MiB|GiB)", printed)
    assert found is not None, printed
    return float(found[1]) * {"MiB": 1, "GiB": 1024}[found[2]]


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for variant in options.variants:
        for precision in options.precisions:
            model = network(options.size, variant, options.vocabulary, options.length)
            values = recipe_of(
                folder / f"{variant}-{precision}",
                model,
                steps=options.steps,
                sequences=options.micro_batch * options.ranks * 2,
                micro_batch=options.micro_batch,
                precision=precision,
                activation_checkpointing=options.activation_checkpointing,
            )
            for stage in options.stages:
                if stage == "zero0" and precision == "bf16":
                    continue
                values["deepspeed"] = {"config": stage}
                estimate = estimated_mib(folder, values, options.ranks)
                train(folder, {**values, "budget": {"steps": 2}}, options.ranks, **GIVE_BACK)
                before = records(values, "event")[0]["memory_bytes"]
                peak = (records(values)[-1]["memory_peak_bytes_per_rank"][0] - before) / 2**20
                train(folder, values, options.ranks)
                found = records(values)
                rows.append(
                    {
                        "model": variant,
                        "precision": precision,
                        "stage": stage,
                        "tokens_per_second": median(found, "tokens_per_second"),
                        "step_seconds": median(found, "step_seconds"),
                        **{part: statistics.median(row["parts"].get(part, 0.0) for row in found[1:]) for part in PARTS},
                        "peak_mib": peak,
                        "estimate_mib": estimate,
                        "estimate_ratio": estimate / peak,
                    }
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    known = parser(__doc__, "zero_stages-cpu", size="30m", length=128, steps=4)
    known.add_argument("--ranks", type=int, default=2)
    known.add_argument("--stages", nargs="+", default=["zero0", "zero1", "zero2", "zero3"])
    known.add_argument("--variants", nargs="+", default=["vanilla"])
    known.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    known.add_argument("--activation-checkpointing", default="none")
    known.add_argument("--micro-batch", type=int, default=2)
    run(
        measure,
        known.parse_args(arguments),
        "{size}, {ranks} ranks, {micro_batch} x {length} tokens a micro-batch, "
        "activation checkpointing {activation_checkpointing}; seconds and MiB of a rank.",
        "model | precision | ZeRO | tokens/s | step | forward | backward | optimiser | communication | peak | estimate "
        "| estimate / peak",
        "{model} | {precision} | {stage} | {tokens_per_second:.0f} | {step_seconds:.2f} | {forward:.2f} | "
        "{backward:.2f} | {optimizer:.2f} | {communication:.2f} | {peak_mib:.0f} | {estimate_mib:.0f} | "
        "{estimate_ratio:.2f}",
    )


if __name__ == "__main__":
    main()
