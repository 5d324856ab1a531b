"""One process of `test_zero.py`: trains a small model under ZeRO and writes what happened.

Started as `python zero_worker.py JOB.json`, where the job holds a list of cases; the launcher sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

from mor_model.config import ModelConfig
from mor_model.model import RecursiveTransformer


def engine_config(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": case["sequences"],
        "train_micro_batch_size_per_gpu": case["sequences"] // world_size // case["accumulation"],
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig.from_dict(case["model"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    settings = engine_config(case, world_size)
    if case["partitioned_construction"]:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = RecursiveTransformer(config, case["activation_checkpointing"])
        model.initialize(case["seed"], lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0))
    else:
        model = RecursiveTransformer(config, case["activation_checkpointing"])
        model.initialize(case["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"], betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    ids, labels = (torch.tensor(case[name]) for name in ("ids", "labels"))
    micro = settings["train_micro_batch_size_per_gpu"]
    losses, norms, counts = [], [], []
    for _ in range(case["steps"]):
        total = 0.0
        for part in range(case["accumulation"]):
            first = (rank * case["accumulation"] + part) * micro
            rows = slice(first, first + micro)
            out = engine(ids[rows], labels[rows])
            engine.backward(out.loss)
            engine.step()
            total += out.loss.item() / case["accumulation"]
            if case["probe"]:
                counts.append(routed_tokens(engine, ids[rows]))
        value = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(value)
        losses.append(value.item() / world_size)
        if case["stage"] > 0:  # at stage 0 the engine clips without keeping the norm
            norms.append(float(engine.get_global_grad_norm()))
    tied = model.head.weight is model.embedding.weight
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=case["stage"] == 3):
        checksum = {name: p.detach().double().abs().sum().item() for name, p in model.named_parameters()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "counts": counts, "tied": tied, "checksum": checksum}


def routed_tokens(engine: Any, ids: torch.Tensor) -> list[int]:
    """Tokens of this process at each recursion step."""
    with torch.no_grad():
        return [step.valid_BN.sum().item() for step in engine(ids, return_routing=True).routing.steps]


if __name__ == "__main__":
    torch.set_num_threads(1)
    __compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, and nothing has to be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run(case) for name, case in job["cases"].items()}
    Path(job["out"]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
