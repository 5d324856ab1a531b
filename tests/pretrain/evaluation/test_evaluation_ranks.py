"""Two ranks give one process's numbers when a launcher starts `mor eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.evaluation.evaluate import evaluate_run
from pretrain.evaluation.settings import HELD_OUT_SUITES, Settings
from tests.ports import free_port
from tests.pretrain.evaluation.runs import make_run
from tests.pretrain.evaluation.test_own_suite import prose
from tests.pretrain.support import ROOT, Nursery


def test_a_launched_mor_eval_shares_the_work(tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    # Seven documents of different lengths: the ranks' shares are uneven.
    run = make_run(tmp_path / "run", [prose(seed, 6 + 5 * seed) for seed in range(7)])
    alone = json.loads(json.dumps(evaluate_run(run, HELD_OUT_SUITES, settings=Settings(limit=4))))
    for suite in HELD_OUT_SUITES:
        (run.evaluation / f"{suite}.json").unlink()
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "MOR_SHARED_DATA": ""}
    ranks = [
        nursery.start(
            ROOT / "pretrain/cli/main.py",
            ["eval", str(run.path), "--limit", "4", "--device", "cpu"],
            {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "perplexity" in printed[0][0] and printed[1][0] == "", "rank 0 alone shows the table"
    for suite in HELD_OUT_SUITES:
        together = json.loads((run.evaluation / f"{suite}.json").read_text())
        assert together["identity"] == alone[suite]["identity"]
        assert together["tasks"].keys() == alone[suite]["tasks"].keys()
        for name, task in together["tasks"].items():
            expected = alone[suite]["tasks"][name]
            assert (task["n"], task["text_sha256"]) == (expected["n"], expected["text_sha256"])
            # Batches of other shapes round otherwise.
            for kind in ("metrics", "stderr"):
                assert task[kind] == pytest.approx(expected[kind], rel=1e-4, abs=1e-5)
