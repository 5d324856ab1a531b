"""How long training waits for a checkpoint, written synchronously or by a thread.

`stall` is the time a checkpoint adds between two steps. `slower steps` is how much longer the steps in the first half
of the interval after it take than those in the second half, while the thread writes. `cost` is their sum per
checkpoint. All are medians over the checkpoints.

    python -m benchmarks.checkpoint_stall --ranks 2
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.recording import restart_with_steady_heap
from benchmarks.training_runs import network, parser, recipe_of, records, run, train


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
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
    return rows


def main(arguments: list[str] | None = None) -> None:
    known = parser(__doc__, "checkpoint_stall-cpu", size="30m", length=128, steps=25)
    known.add_argument("--ranks", type=int, default=1)
    known.add_argument("--every", type=int, default=6)
    run(
        measure,
        known.parse_args(arguments),
        "{size}, bf16 with fp32 master weights, ZeRO stage 3, {ranks} rank(s), a checkpoint every "
        "{every} steps; seconds per checkpoint.",
        "written | MiB | a step | stall | slower steps | cost",
        "{written} | {mib:.0f} | {step_seconds:.2f} | {stall_seconds:.2f} | {slower_seconds:.2f} | {cost_seconds:.2f}",
    )


if __name__ == "__main__":
    restart_with_steady_heap()
    main()
