"""Two ranks give one process's numbers: under ZeRO-3 in the training loop, and when a launcher starts `mor eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.evaluation.evaluate import evaluate_run
from pretrain.evaluation.settings import Settings
from pretrain.ranks.environment import clean_environment
from pretrain.records.run_folder import RunFolder
from tests.ports import free_port
from tests.pretrain.evaluation.runs import make_run
from tests.pretrain.evaluation.test_own_suite import prose

ROOT = Path(__file__).resolve().parents[3]
SUITES = ["perplexity", "own", "routing"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    # Seven documents of different lengths: the ranks' shares are uneven.
    return make_run(tmp_path_factory.mktemp("ranks") / "run", [prose(seed, 6 + 5 * seed) for seed in range(7)])


def on_two_ranks(*command: object) -> None:
    shared = {
        **clean_environment(),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    shared.pop("MOR_SHARED_DATA", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


def same_numbers(found, expected) -> None:
    """Equal up to the rounding of batches of other shapes; seconds, and the checksum over them, aside."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"seconds", "checksum"}:
            same_numbers(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same_numbers(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


def test_the_training_loop_evaluates_on_all_ranks(run, tmp_path, monkeypatch):
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    on_two_ranks(ROOT / "tests/pretrain/evaluation/rank_worker.py", run.path, tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    alone = evaluate_run(run, SUITES, settings=Settings(limit=5))
    for suite in SUITES:
        same_numbers(
            {key: found[suite][key] for key in ("tasks", "skipped", "primary")},
            {key: json.loads(json.dumps(alone[suite][key])) for key in ("tasks", "skipped", "primary")},
        )


def test_a_launched_mor_eval_shares_the_work(run, monkeypatch):
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    alone = json.loads(json.dumps(evaluate_run(run, SUITES, settings=Settings(limit=4))))
    for suite in SUITES:
        os.unlink(run.evaluation / f"{suite}.json")
    on_two_ranks(
        "-m", "pretrain.cli.main", "eval", run.path, "--limit", 4, "--device", "cpu", *(f"--suite={s}" for s in SUITES)
    )
    for suite in SUITES:
        same_numbers(json.loads((run.evaluation / f"{suite}.json").read_text()), alone[suite])
