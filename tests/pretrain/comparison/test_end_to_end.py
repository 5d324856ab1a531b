"""An experiment as a person runs it: the command, real training on two ranks, real evaluation, a Ctrl-C, the report."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from mor_model.config import ModelConfig
from mor_model.flops import flops_per_sequence
from tests.pretrain.comparison.synthetic import TINY, TINY_ARMS, write_corpus

EXPERIMENT = {
    "name": "small",
    "data": {"corpus": "corpus.jsonl", "vocab_size": 300, "test": 0.05, "validation": 0.05},
    "launch": {"launcher": "deepspeed", "ranks": 2},
    "base": {
        "seed": 1,
        "model": TINY,
        "batch": {"sequences": 8, "micro_batch": 4, "sequence_length": 32},
        "precision": "fp32",
        "logging": {"every": 2},
        "evaluation": {"every": 0.25, "sequences": 8},
    },
    "budgets": [6e9, 12e9],
    "arms": TINY_ARMS,
    "evaluation": {"suites": ["perplexity", "routing", "own"], "limit": 5},
}


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretrain.cli.main", "compare", "run", "experiment.yaml"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_an_experiment_survives_ctrl_c_and_ends_in_a_report(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False), encoding="utf-8")

    run = tmp_path / "runs/small/vanilla"
    first = start(tmp_path)
    while not (run / "metrics.jsonl").exists() or '"kind":"train"' not in (run / "metrics.jsonl").read_text():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75 and "the same command continues" in output, output
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < status["steps"]
    assert str(tmp_path) not in [process.info["cwd"] for process in psutil.process_iter(["cwd"])]

    second = start(tmp_path)
    output, _ = second.communicate(timeout=1200)
    assert second.returncode == 0, output
    assert str(Path("runs/small/report/index.html")) in output.replace("\n", "")

    with (tmp_path / "runs/small/report/report.csv").open() as stream:
        read = csv.DictReader(stream)
        found = {(r["run"], r["quantity"], r["routing"]): float(r["value"]) for r in read if r["quantity"]}
    runs = ["vanilla", "mor", "vanilla/6e09", "mor/6e09"]
    assert {key[0] for key in found} == set(runs)
    for name in runs:
        budget = 6e9 if name.endswith("6e09") else 12e9
        folder = tmp_path / "runs/small" / name.replace("/", "/branches/")
        assert found[name, "training_flops_counted", ""] == pytest.approx(budget, rel=0.01)
        # Counted again from what was logged, by this test.
        config = ModelConfig.from_dict(json.loads((folder / "model.json").read_text()))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [record for record in records if record["kind"] == "train"][-1]
        per_sequence = flops_per_sequence(config, 32, active=[share * 32 for share in last["active"]]).training
        assert last["flops"] == pytest.approx(last["tokens"] / 32 * per_sequence)
        assert 0 < found[name, "perplexity/bits_per_byte", "causal"] < 8
        assert found[name, "validation_loss", "causal"] > 0
    assert found["mor", "validation_loss", "topk"] != found["mor", "validation_loss", "causal"]

    # Each result says how long it took, so one that was made again would differ.
    stored = {file: file.read_bytes() for file in tmp_path.glob("runs/small/**/evaluation/*.json")}
    third = start(tmp_path)
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0 and "trained already" in output
    assert len(stored) == 12 and all(file.read_bytes() == content for file, content in stored.items())
