"""The figures of docs/scale.md, computed from the code they speak of, as a Markdown table; `--measure` adds those of
this machine and environment.

    python -m benchmarks.scale --preset 1.7b --ranks 16 512
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence

from mor_model.flops import count_parameters, flops_per_sequence
from mor_model.presets import PRESETS, preset
from pretrain.recipe.deepspeed_json import resolve_ds_config
from pretrain.recipe.recipe import build_recipe
from pretrain.training.memory import Passes, estimate_memory

SEQUENCES, LENGTH = 1024, 2048
IMPORTED = """
import sys, pathlib
import pretrain.training.run
modules = sum(bool(getattr(module, "__file__", None)) for module in list(sys.modules.values()))
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(modules, "Python modules and", len({line.split()[-1] for line in maps if ".so" in line}), "shared libraries")
"""


def resident(name: str, zero: str, ranks: int) -> int:
    """Bytes of weights, gradients and optimiser states on one of `ranks` GPUs, as training estimates them."""
    values = {
        "name": "scale",
        "model": {"preset": name},
        "data": {"path": "data"},
        "budget": {"steps": 1},
        "batch": {"sequences": SEQUENCES, "micro_batch": SEQUENCES // ranks, "sequence_length": LENGTH},
        "precision": "bf16",
        "deepspeed": {"config": zero},
    }
    recipe = build_recipe(values)
    ds_config = resolve_ds_config(recipe, ranks)
    memory = estimate_memory(recipe, ds_config, ranks, on_cpu=False, passes=Passes(0, 0))
    return memory.weights + memory.gradients + memory.optimizer


def table(name: str, ranks: Sequence[int]) -> list[str]:
    """Rows of Markdown: the figure, its formula, and its value for each number of ranks G."""
    stored = count_parameters(preset(name)).total_stored
    flops = flops_per_sequence(preset(name), LENGTH).training
    mor = count_parameters(preset(name, "mor", 3))

    def gigabytes(value: float) -> str:
        return f"{value / 1e9:.2f} GB"

    rows = [
        (f"stored parameters of {name}, P", "`count_parameters`", lambda g: f"{stored / 1e9:.3f}e9"),
        ("the same of its MoR, R = 3; applied to a token of full depth", "`count_parameters`",
         lambda g: f"{mor.total_stored / 1e9:.3f}e9; {mor.applied / 1e9:.3f}e9"),
        ("training FLOPs of a micro-batch", "`flops_per_sequence` x sequences / G",
         lambda g: f"{flops * SEQUENCES / g:.2e}"),
        ("weights, gradients, optimiser states of a GPU, zero1", "`estimate_memory`",
         lambda g: gigabytes(resident(name, "zero1", g))),
        ("the same, zero3", "`estimate_memory`", lambda g: gigabytes(resident(name, "zero3", g))),
        ("in and out of a GPU for a step, zero1", "2 (G - 1) / G x 2 P", lambda g: gigabytes(4 * stored * (g - 1) / g)),
        ("in and out of a GPU for a micro-batch, zero3", "3 (G - 1) / G x 2 P",
         lambda g: gigabytes(6 * stored * (g - 1) / g)),
        ("checkpoint", "14 P", lambda g: gigabytes(14 * stored)),
        ("one rank's part of it", "14 P / G", lambda g: gigabytes(14 * stored / g)),
        ("text of a step", "sequences x length x 2", lambda g: f"{SEQUENCES * LENGTH * 2 / 1e6:.1f} MB"),
        ("means, memory and requests of a step, all-reduced", "5 G x 8", lambda g: f"{5 * g * 8 / 1e3:.1f} kB"),
        ("connections of rank 0", "2 G", lambda g: f"{2 * g:,}"),
    ]  # fmt: skip
    head = ["figure", "from", *(f"G = {g}" for g in ranks)]
    lines = [head, ["---"] * len(head), *([what, how, *(value(g) for g in ranks)] for what, how, value in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def measure() -> None:
    """Print what depends on the machine and the environment."""
    print("imported by a rank:", flush=True)
    subprocess.run([sys.executable, "-c", IMPORTED], check=True)
    content = bytes(1 << 28)
    start = time.perf_counter()
    hashlib.sha256(content).digest()
    print(f"SHA-256 on one core: {len(content) / (time.perf_counter() - start) / 1e9:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="1.7b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    print("\n".join(table(options.preset, options.ranks)))
    if options.measure:
        measure()


if __name__ == "__main__":
    main()
