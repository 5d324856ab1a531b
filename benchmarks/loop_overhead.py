"""What the training loop costs beside the model's step: its time a step over that of the same step in plain PyTorch.

The bare step is forward and backward passes of the micro-batches, gradient clipping and fused AdamW, on batches that
lie ready, in this process; the loop reads data, runs under DeepSpeed, adds up statistics over ranks, counts FLOPs and
writes a record every step, in a process of its own. They run in turns. Whatever else a machine does only ever adds to a
step, so the fastest steps of all turns are compared; the medians stand beside them. 1.00 is a loop that costs nothing;
the target is 1.05 on a CPU. What ZeRO-3 adds to ZeRO-0 is DeepSpeed's hooks around every module.

    python -m benchmarks.loop_overhead                             # a CPU, one thread: OMP_NUM_THREADS=1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import machine, record, restart_with_steady_heap
from benchmarks.training_runs import WIDTHS, network, recipe_of, records, train
from data_prep.dataset import open_dataset
from mor_model.model import RecursiveTransformer
from pretrain.recipe import build_recipe


def bare_seconds(values: dict[str, Any], warmup: int) -> list[float]:
    """Seconds of the bare steps after the first `warmup` of the recipe's network on its batches."""
    recipe = build_recipe(values)
    model = RecursiveTransformer(recipe.network(), recipe.checkpointing)
    model.initialize(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr, fused=True)
    length, micro = recipe.batch.sequence_length, recipe.batch.micro_batch
    data = open_dataset(str(recipe.data.path))
    rows = torch.from_numpy(data.batch(range(recipe.batch.sequences), length).astype("int64"))
    seconds = []
    assert recipe.budget.steps is not None
    for _ in range(recipe.budget.steps):
        began = time.perf_counter()
        for tokens in rows.split(micro):
            (model(tokens[:, :-1], tokens[:, 1:]).loss * micro / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds[warmup:]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    for variant in options.variants:
        model = network(options.size, variant, options.vocabulary, options.length)
        values = recipe_of(
            folder / variant, model, steps=options.steps, sequences=options.sequences, micro_batch=options.micro_batch
        )
        turns: dict[str, list[float]] = {"bare": [], **{stage: [] for stage in options.stages}}
        parts: dict[str, dict[str, float]] = {}
        for turn in range(options.rounds):
            for name in list(turns) if turn % 2 else list(turns)[::-1]:
                if name == "bare":
                    turns[name] += bare_seconds(values, options.warmup)
                    continue
                train(folder / variant, {**values, "deepspeed": {"config": name}}, 1)
                found = records(values)[options.warmup :]
                turns[name] += [row["step_seconds"] for row in found]
                parts[name] = min(found, key=lambda row: row["step_seconds"])["parts"]
        for stage in options.stages:
            rows.append(
                {
                    "model": variant,
                    "stage": stage,
                    "bare_seconds": min(turns["bare"]),
                    "loop_seconds": min(turns[stage]),
                    "ratio": min(turns[stage]) / min(turns["bare"]),
                    "median_ratio": statistics.median(turns[stage]) / statistics.median(turns["bare"]),
                    "data_share": parts[stage]["data"] / min(turns[stage]),
                    "parts": parts[stage],
                    "steps": {"bare": turns["bare"], "loop": turns[stage]},
                }
            )
    return {"rows": rows, "options": vars(options), "machine": machine("cpu")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(WIDTHS), default="6m")
    parser.add_argument("--variants", nargs="+", default=["vanilla", "mor"])
    parser.add_argument("--stages", nargs="+", default=["zero0", "zero1", "zero3"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="loop_overhead-cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="loop-overhead-") as folder:
        result = measure(options, Path(folder))
    table = (
        f"{options.size}, fp32, {options.sequences} x {options.length} tokens a step in micro-batches of "
        f"{options.micro_batch}, one rank; the fastest of {options.rounds} turns of {options.steps} steps.\n\n"
        "| model | ZeRO | bare step, s | loop, s | loop / bare | of medians | data share |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(
            "| {model} | {stage} | {bare_seconds:.3f} | {loop_seconds:.3f} | {ratio:.3f} | {median_ratio:.3f} | "
            "{data_share:.2%} |".format(**row)
            for row in result["rows"]
        )
    )
    record(options.name, result, table)


if __name__ == "__main__":
    restart_with_steady_heap()
    main()
