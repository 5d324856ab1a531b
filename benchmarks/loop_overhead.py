"""Overhead of the training loop: time per step relative to plain PyTorch and to a bare DeepSpeed engine.

The bare step runs in this process: forward and backward passes of the micro-batches, gradient clipping and fused
AdamW, on batches in memory. The bare engine runs `engine(...)`, `engine.backward` and `engine.step` on the same
batches at the same ZeRO stage, in a process of its own. Its time beyond the bare step is DeepSpeed's (at ZeRO-3:
hooks around every module and copies of all gradients, whose share falls with the tokens of a micro-batch). The loop,
also in its own process, reads data, reduces statistics over ranks, times its parts and every collective, counts FLOPs
and writes a record every step.

The three take turns. Other work on the machine can only add time, so the fastest steps of all turns are compared;
medians are given beside them. A ratio of 1.00 means no overhead; the target is 1.05 on a CPU.

    python -m benchmarks.loop_overhead                             # a CPU, one thread
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import restart_with_steady_heap
from benchmarks.training_runs import network, parser, recipe_of, records, run, train
from data_prep.reading.dataset import open_dataset
from mor_model.model import RecursiveTransformer
from pretrain.ranks.environment import prepare_environment
from pretrain.recipe.deepspeed_json import resolve_ds_config
from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.training.engine import build_engine, start_process_group


def batch_of(recipe: Recipe) -> tuple[torch.Tensor, ...]:
    """Micro-batches of token ids, [micro-batch, T + 1] each."""
    data = open_dataset(str(recipe.data.path))
    rows = torch.from_numpy(data.batch(range(recipe.batch.sequences), recipe.batch.sequence_length).astype("int64"))
    return rows.split(recipe.batch.micro_batch)


def timed(steps: int | None, warmup: int, step: Callable[[], None]) -> list[float]:
    """Seconds of each of `steps` steps, without the first `warmup`."""
    assert steps is not None
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds[warmup:]


def bare_seconds(values: dict[str, Any], warmup: int) -> list[float]:
    """Seconds per step of the recipe's network in plain PyTorch."""
    recipe = build_recipe(values)
    model = RecursiveTransformer(recipe.network, recipe.activation_checkpointing)
    model.initialize(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr, fused=True)
    batch = batch_of(recipe)

    def step() -> None:
        for tokens in batch:
            (model(tokens[:, :-1], tokens[:, 1:]).loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return timed(recipe.budget.steps, warmup, step)


def engine_seconds(values: dict[str, Any], warmup: int) -> list[float]:
    """Seconds per step of a bare DeepSpeed engine. Run it in a process of its own."""
    ranks = prepare_environment()
    recipe = build_recipe(values)
    start_process_group(ranks, 600.0)
    engine, _ = build_engine(recipe, resolve_ds_config(recipe, 1), make_plan(recipe).learning_rate, None)
    batch = batch_of(recipe)

    def step() -> None:
        for tokens in batch:
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).loss)
            engine.step()

    return timed(recipe.budget.steps, warmup, step)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for variant in options.variants:
        model = network(options.size, variant, options.vocabulary, options.length)
        values = recipe_of(
            folder / variant, model, steps=options.steps, sequences=options.sequences, micro_batch=options.micro_batch
        )
        names = ["bare", *(f"{kind} {stage}" for stage in options.stages for kind in ("engine", "loop"))]
        turns: dict[str, list[float]] = {name: [] for name in names}
        parts: dict[str, dict[str, float]] = {}
        for turn in range(options.rounds):
            for name in names if turn % 2 else names[::-1]:
                kind, _, stage = name.partition(" ")
                staged = {**values, "deepspeed": {"config": stage}}
                if kind == "bare":
                    turns[name] += bare_seconds(values, options.warmup)
                elif kind == "engine":
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                        turns[name] += process.submit(engine_seconds, staged, options.warmup).result()
                else:
                    train(folder / variant, staged, 1)
                    found = records(values)[options.warmup :]
                    turns[name] += [row["step_seconds"] for row in found]
                    parts[stage] = min(found, key=lambda row: row["step_seconds"])["parts"]
        for stage in options.stages:
            steps = {"bare": turns["bare"], "engine": turns[f"engine {stage}"], "loop": turns[f"loop {stage}"]}
            fastest = {kind: min(seconds) for kind, seconds in steps.items()}
            median = {kind: statistics.median(seconds) for kind, seconds in steps.items()}
            rows.append(
                {
                    "model": variant,
                    "stage": stage,
                    **{f"{kind}_seconds": seconds for kind, seconds in fastest.items()},
                    "ratio": fastest["loop"] / fastest["bare"],
                    "engine_ratio": fastest["loop"] / fastest["engine"],
                    "median_ratio": median["loop"] / median["bare"],
                    "median_engine_ratio": median["loop"] / median["engine"],
                    "data_share": parts[stage]["data"] / fastest["loop"],
                    "parts": parts[stage],
                    "steps": steps,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    known = parser(__doc__, "loop_overhead-cpu", size="6m", length=256, steps=12)
    known.add_argument("--variants", nargs="+", default=["vanilla", "mor"])
    known.add_argument("--stages", nargs="+", default=["zero0", "zero1", "zero3"])
    known.add_argument("--sequences", type=int, default=8)
    known.add_argument("--micro-batch", type=int, default=4)
    known.add_argument("--warmup", type=int, default=2)
    known.add_argument("--rounds", type=int, default=3)
    run(
        measure,
        known.parse_args(arguments),
        "{size}, fp32, {sequences} x {length} tokens a step in micro-batches of "
        "{micro_batch}, one rank; the fastest of {rounds} turns of {steps} steps.",
        "model | ZeRO | bare step, s | bare engine, s | loop, s | loop / bare | of medians | loop / engine "
        "| of medians | data share",
        "{model} | {stage} | {bare_seconds:.3f} | {engine_seconds:.3f} | {loop_seconds:.3f} | {ratio:.3f} | "
        "{median_ratio:.3f} | {engine_ratio:.3f} | {median_engine_ratio:.3f} | {data_share:.2%}",
    )


if __name__ == "__main__":
    # The same thread count as the ranks of the loop.
    restart_with_steady_heap(OMP_NUM_THREADS="1")
    main()
