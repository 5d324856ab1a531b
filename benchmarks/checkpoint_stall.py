"""How long training stands still for a checkpoint: written at once, and by a thread while training goes on.

`stall` is the time between two steps that a checkpoint took; `slower steps` is what the steps of the half interval
after it took longer than those of the other half of the same run, while a thread wrote; `cost` is both together, per
checkpoint. Medians over the checkpoints.

    python -m benchmarks.checkpoint_stall --ranks 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.recording import machine, record, restart_with_steady_heap
from benchmarks.training_runs import WIDTHS, network, recipe_of, records, train


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = network(options.size, "vanilla", options.vocabulary, options.length)
    values = recipe_of(
        folder, model, steps=options.steps, sequences=2 * options.ranks, micro_batch=1, precision="bf16",
        deepspeed={"config": "zero3"},
    )  # fmt: skip
    rows = []
    for name, asynchronous in (("at once", False), ("by a thread", True)):
        checkpoint = {"every": options.every, "keep": 1, "asynchronous": asynchronous}
        train(folder, {**values, "checkpoint": checkpoint}, options.ranks)
        found = records(values)
        # What happened after the record of a checkpoint's step stands in the next one.
        stalls = [row["pause_seconds"] for row in found if row["step"] % options.every == 1 and row["step"] > 1]
        written = next((Path(values["run_dir"]) / "checkpoints").glob("step-*"))
        # By the number of steps since the last checkpoint; before the first one the process is still warming up.
        since: dict[int, list[float]] = {}
        for row in found[options.every :]:
            since.setdefault((row["step"] - 1) % options.every, []).append(row["step_seconds"])
        typical = [statistics.median(seconds) for _, seconds in sorted(since.items())]
        half = options.every // 2
        usual = statistics.median(typical[half:])
        slower = sum(seconds - usual for seconds in typical[:half])
        rows.append(
            {
                "written": name,
                "mib": sum(file.stat().st_size for file in written.rglob("*") if file.is_file()) / 2**20,
                "stall_seconds": statistics.median(stalls),
                "slower_seconds": slower,
                "cost_seconds": statistics.median(stalls) + slower,
                "step_seconds": usual,
                "step_seconds_since": typical,
            }
        )
    return {"rows": rows, "options": vars(options), "machine": machine("cpu")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(WIDTHS), default="30m")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--name", default="checkpoint_stall-cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="checkpoint-stall-") as folder:
        result = measure(options, Path(folder))
    lines = [
        "| {written} | {mib:.0f} | {step_seconds:.2f} | {stall_seconds:.2f} | {slower_seconds:.2f} | "
        "{cost_seconds:.2f} |".format(**row)
        for row in result["rows"]
    ]
    table = (
        f"{options.size}, bf16 with fp32 master weights, ZeRO stage 3, {options.ranks} rank(s), a checkpoint every "
        f"{options.every} steps; seconds per checkpoint.\n\n"
        "| written | MiB | a step | stall | slower steps | cost |\n|---|---|---|---|---|---|\n" + "\n".join(lines)
    )
    record(options.name, result, table)


if __name__ == "__main__":
    restart_with_steady_heap()
    main()
