"""ZeRO stages side by side: time and memory of a step on the ranks of this machine.

On a CPU all ranks share its cores, so seconds say what partitioning costs, not what several devices gain. The memory is
the peak of a rank over what the process held before the network was built, in a run of its own whose allocator gives
freed memory back at once, so that the resident size is what is alive; beside it what `--dry-run` estimates.

    python -m benchmarks.zero_stages --ranks 2
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.recording import machine, record
from benchmarks.training_runs import GIVE_BACK, WIDTHS, median, network, recipe_of, records, train

PARTS = ("forward", "backward", "optimizer", "communication", "data")


def estimated_mib(folder: Path, values: dict[str, Any], ranks: int) -> float:
    """What a dry run says a rank needs."""
    printed = train(folder, values, ranks, "--dry-run")
    found = re.search(r"memory +about ([0-9.]+) (MiB|GiB)", printed)
    assert found is not None, printed
    return float(found[1]) * {"MiB": 1, "GiB": 1024}[found[2]]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
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
                checkpointing=options.checkpointing,
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
    return {"rows": rows, "options": vars(options), "machine": machine("cpu")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(WIDTHS), default="30m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", default=["zero0", "zero1", "zero2", "zero3"])
    parser.add_argument("--variants", nargs="+", default=["vanilla"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--name", default="zero_stages-cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="zero-stages-") as folder:
        result = measure(options, Path(folder))
    lines = [
        "| {model} | {precision} | {stage} | {tokens_per_second:.0f} | {step_seconds:.2f} | {forward:.2f} | "
        "{backward:.2f} | {optimizer:.2f} | {communication:.2f} | {peak_mib:.0f} | {estimate_mib:.0f} | "
        "{estimate_ratio:.2f} |".format(**row)
        for row in result["rows"]
    ]
    table = (
        f"{options.size}, {options.ranks} ranks, {options.micro_batch} x {options.length} tokens a micro-batch, "
        f"checkpointing {options.checkpointing}; seconds and MiB of a rank.\n\n"
        "| model | precision | ZeRO | tokens/s | step | forward | backward | optimiser | communication | peak "
        "| estimate | estimate / peak |\n" + "|---" * 12 + "|\n" + "\n".join(lines)
    )
    record(options.name, result, table)


if __name__ == "__main__":
    main()
