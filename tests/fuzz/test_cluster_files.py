"""Files of submission: clusters, remembered jobs, histories of starts and a run's status."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cluster.clusters import Cluster, load_cluster
from pretrain.cluster.job_records import Record, remembered
from pretrain.cluster.jobs import view_jobs
from pretrain.cluster.restarts import note_start
from pretrain.cluster.submit import job_environment, slurm_options
from pretrain.recipe.recipe import build_recipe
from pretrain.records.finished import unfinished
from tests.fuzz.support import counts, drive, from_file, lost, mutate_json, mutate_text, mutate_value
from tests.pretrain.support import recipe_values, tiny_model

CLUSTER = {
    "partition": "gpu",
    "account": "nlp",
    "qos": "normal",
    "constraint": "h100",
    "time": "24:00:00",
    "nodes": 4,
    "gpus_per_node": 8,
    "tasks_per_node": 8,
    "setup": "module load cuda/12.4 && source ~/mor/.venv/bin/activate",
    "container": "/images/mor.sif",
    "environment": {"NCCL_DEBUG": 1, "NCCL_SOCKET_IFNAME": "ib0"},
    "launcher": "srun",
    "health": "exclude",
    "requeue": False,
    "chain": 10,
    "options": ["--mail-type=END"],
}
RECORD = {
    "job": "41",
    "name": "tiny",
    "kind": "train",
    "run": "runs/tiny",
    "log": "logs/41.out",
    "time": 1.7e9,
    "recipe": "tiny.yaml",
    "overrides": ["budget.steps=24"],
}
START = {"reached": "a checkpoint after step 0", "cause": "restart 1", "time": "2026-01-01T00:00:00Z"}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No Slurm, no other files than the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MOR_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("MOR_JOBS", str(tmp_path / "jobs.jsonl"))


def read_cluster(file: Path) -> Cluster:
    cluster = load_cluster()
    words = [
        *slurm_options(cluster, nodes=1, gpus=None, tasks=None),
        *itertools.chain(*job_environment(cluster).items()),
    ]
    assert not any(b"\0" in os.fsencode(word) for word in words), "no program could be started with this"
    return cluster


@counts
def test_clusters(count):
    whole = {"default": "a", "clusters": {"a": CLUSTER, "b": {}}}

    use = from_file(Path("clusters.yaml"), read_cluster)

    def changed(given: Any, cluster: Cluster) -> str | None:
        chosen = given["clusters"][given["default"]] if (given or {}).get("default") is not None else {}
        for key, value in chosen.items():
            wanted: Any = value
            if key == "time" and value is not None:
                wanted = str(value)
            elif key == "environment":
                wanted = {name: str(text) for name, text in value.items()}
            if (difference := lost(wanted, getattr(cluster, key))) is not None:
                return f"{key}: {difference}"
        return None

    def use_values(given: Any) -> Cluster:
        return use(yaml.safe_dump(given))

    drive(count, lambda source: mutate_value(whole, source), use_values, changed=changed, used=0.05, refused=0.2)
    text = yaml.safe_dump({"default": "a", "clusters": {"a": CLUSTER}})
    drive(count, lambda source: mutate_text(text, source), use, used=0.1, refused=0.2)


@counts
def test_remembered_jobs(count):
    def make(source: random.Random) -> bytes:
        return json.dumps(RECORD).encode() + b"\n" + mutate_json(RECORD, source) + b"\n"

    def read(file: Path) -> tuple[list[Record], list[str]]:
        said: list[str] = []
        records = remembered(said.append)
        assert len(view_jobs(records)) == len(records)
        return records, said

    def changed(given: bytes, result: tuple[list[Record], list[str]]) -> str | None:
        records, said = result
        lines = [line for line in given.split(b"\n") if line.strip()]
        if len(records) < len(lines) and len(said) != 1:
            return "a line is missing, and nothing is said"
        meant = [value for line in lines if isinstance(value := json_or_none(line), dict)]
        for record in records:
            # A time may be written as a whole number; what a line leaves out has its default.
            if not any(all(v == type(v)(value.get(k, v)) for k, v in vars(record).items() if v) for value in meant):
                return str(record)
        return None

    drive(count, make, from_file(Path("jobs.jsonl"), read), changed=changed, used=1)


def json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@counts
def test_histories_of_starts(count):
    file = Path(".run.restarts.json")

    def make(source: random.Random) -> bytes:
        return mutate_json({"job": "1", "starts": [START] * source.randrange(5)}, source)

    def read(file: Path) -> tuple[str | None, list[str]]:
        said: list[str] = []
        return note_start(file, "RUN", START["reached"], "1", said.append), said

    def changed(given: bytes, result: tuple[str | None, list[str]]) -> str | None:
        problem, said = result
        starts = json.loads(file.read_text())["starts"]
        if said and len(starts) != 1:
            return "called damaged, and used"
        alike = [start["reached"] for start in starts] == [START["reached"]] * len(starts)
        return "the wrong number of starts" if alike and (problem is not None) != (len(starts) > 3) else None

    drive(count, make, from_file(file, read), changed=changed, used=1)


@counts
def test_status_files(count, tmp_path):
    run = build_recipe(recipe_values(Path("data"), tmp_path / "run", model=tiny_model("vanilla")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(run.to_yaml())
    (tmp_path / "recipe.yaml").write_text(run.to_yaml())
    record = Record(**{**RECORD, "run": run.run_folder, "recipe": str(tmp_path / "recipe.yaml"), "overrides": []})

    def make(source: random.Random) -> bytes:
        status = {"state": source.choice(["finished", "running", "failed"]), "step": 12, "steps": 12, "reason": "no"}
        return mutate_json(status, source)

    def read(file: Path) -> tuple[bool, str]:
        return not unfinished(run), view_jobs([record])[0].state

    def changed(given: bytes, result: tuple[bool, str]) -> str | None:
        finished, state = result
        status = json_or_none(given)
        says = isinstance(status, dict) and status.get("state") == "finished"
        if finished and not says:
            return "finished without saying so"
        return None if (state == "COMPLETED") == finished else f"{state}, and finished: {finished}"

    drive(count, make, from_file(tmp_path / "run" / "status.json", read), changed=changed, used=1)
