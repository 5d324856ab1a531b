"""Training under DeepSpeed ZeRO with two processes equals training in one plain PyTorch process.

The bucket size of 1 is what makes the comparison sharp: with it, an implementation that loses the gradient of all but
one application of a shared layer cannot hide in a bucket.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from mor_model.model import RecursiveTransformer
from tests.mor_model.cases import random_batch, small_config
from tests.ports import free_port

pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("zero_worker.py")
STEPS, SEQUENCES, LEARNING_RATE, SEED = 2, 8, 3e-3, 5


def case(config: ModelConfig, activation_checkpointing: str = "none", stage: int = 3, **changes: Any) -> dict[str, Any]:
    batch = random_batch(config, sequences=SEQUENCES, length=16)
    return {
        "model": config.to_dict(),
        "activation_checkpointing": activation_checkpointing,
        "stage": stage,
        "ids": batch.ids.tolist(),
        "labels": batch.labels.tolist(),
        "sequences": SEQUENCES,
        "accumulation": 1,
        "steps": STEPS,
        "lr": LEARNING_RATE,
        "seed": SEED,
        "partitioned_construction": False,
        "probe": False,
        **changes,
    }


def model_config(router: Any, **fields: Any) -> ModelConfig:
    return small_config(**{"init_std": 0.1, "router": router, **fields})


def launch(cases: dict[str, dict[str, Any]], folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    """Results of every process."""
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "out": str(folder / "result")}))
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "PYTHONPATH": str(root),
    }
    logs = [(folder / f"log.{rank}").open("w+") for rank in range(processes)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(job)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]
    try:
        codes = [worker.wait(timeout=400) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, code in enumerate(codes):
        logs[rank].seek(0)
        assert code == 0, logs[rank].read()[-4000:]
    return [json.loads((folder / f"result.{rank}.json").read_text()) for rank in range(processes)]


def plain_training(job: dict[str, Any]) -> dict[str, list[float]]:
    """The same steps with nothing but torch."""
    model = RecursiveTransformer(ModelConfig.from_dict(job["model"]))
    model.initialize(job["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95))
    ids, labels = torch.tensor(job["ids"]), torch.tensor(job["labels"])
    losses, norms = [], []
    for _ in range(job["steps"]):
        optimizer.zero_grad()
        loss = model(ids, labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms}


def check(name: str, job: dict[str, Any], results: list[dict[str, Any]]) -> None:
    expected = plain_training(job)
    for rank, result in enumerate(results):
        where = f"{name}, rank {rank}"
        assert result[name]["losses"] == pytest.approx(expected["losses"], abs=1e-5), where
        if job["stage"] > 0:
            assert result[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4), where
        assert result[name]["tied"], where


EXPERT = ExpertChoiceConfig(causal_coefficient=0.1, alpha=1.0)
TOKEN = TokenChoiceConfig()


def shallow_and_deep() -> dict[str, Any]:
    """A job in which rank 0 routes nothing beyond the first step.

    Without prelude layers a token's id decides its depth, so rank 0 gets only ids that stop after one step.
    """
    config = model_config(TokenChoiceConfig(balance="none"), sharing="cycle", num_layers=3)
    model = RecursiveTransformer(config)
    model.initialize(SEED)
    depth_of_id = model(torch.arange(config.vocab_size)[None], return_routing=True).routing.depth_BT[0]
    shallow, deep = ((depth_of_id == depth).nonzero().flatten() for depth in (1, config.recursions))
    stream = torch.stack([ids[torch.arange(17) % len(ids)] for ids in (shallow, deep) for _ in range(SEQUENCES // 2)])
    ids, labels = stream[:, :-1].tolist(), stream[:, 1:].tolist()
    return case(config, ids=ids, labels=labels, lr=1e-4, probe=True)


CASES = {
    "vanilla": case(model_config(None, sharing="none", recursions=1, num_layers=3)),
    "recursive": case(model_config(None), "recursion"),
    "expert": case(model_config(EXPERT)),
    "expert-accumulated": case(model_config(EXPERT), "layer", accumulation=2),
    "expert-shared-kv": case(model_config(EXPERT, kv_sharing="shared"), "recursion"),
    "token": case(model_config(TOKEN), "recursion"),
    "token-hybrid-kv": case(model_config(TOKEN, kv_sharing="hybrid"), "selective"),
    "partitioned": case(model_config(EXPERT), "recursion", partitioned_construction=True),
}
LOPSIDED = {
    f"lopsided-{policy}": {**shallow_and_deep(), "activation_checkpointing": policy}
    for policy in ("none", "recursion", "layer", "selective")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return launch({**CASES, **LOPSIDED}, tmp_path_factory.mktemp("zero"))


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("name", CASES)
def test_zero_3_equals_one_process(name, trained):
    check(name, CASES[name], trained)
    losses = trained[0][name]["losses"]
    assert losses[0] - losses[-1] > 0.001, "the comparison wants a model that learns"


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("name", LOPSIDED)
def test_a_process_that_routes_nothing_beyond_the_first_step(name, trained):
    tokens = SEQUENCES // 2 * 16
    assert trained[0][name]["counts"][0] == [tokens, 0, 0]
    assert trained[1][name]["counts"][0] == [tokens, tokens, tokens]
    check(name, LOPSIDED[name], trained)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_policy_and_router(stage, tmp_path):
    networks = ("linear", "mlp", "wide_mlp", "random")
    routers = {f"expert-{n}": ExpertChoiceConfig(network=n, alpha=1.0) for n in networks}
    routers |= {f"token-{n}": TokenChoiceConfig(network=n, balance="none") for n in networks}
    routers["auxiliary"] = ExpertChoiceConfig(causal="aux_router", causal_coefficient=0.1)
    routers["token-bias"] = TokenChoiceConfig(balance="bias", gate="sigmoid", combine="code")
    routers["unrouted"] = None
    cases = {
        f"{name}-{policy}": case(model_config(router), policy, stage)
        for name, router in routers.items()
        for policy in ("none", "recursion", "layer", "selective")
    }
    results = launch(cases, tmp_path)
    for name, job in cases.items():
        check(name, job, results)
