"""Preparing, evaluating and comparing through the scripts of slurm/, as arrays and as MPI ranks."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import skip_or_fail
from tests.slurm.cluster import JOB_PATH, Cluster, most_at_once
from tests.slurm.corpus import prep_arguments

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> str:
    return str(ROOT / "slurm" / f"{name}.sbatch")


def submit(cluster: Cluster, *arguments: str, **environ: str) -> str:
    standard = {"MOR_SETUP": "true", "OMP_NUM_THREADS": "1", "PATH": JOB_PATH}
    return cluster.submit(*arguments, **{**standard, **environ})


def shards(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*-0*.*"))}


def test_an_array_of_tasks_and_its_merge_make_what_one_process_makes(cluster, corpus, prepared):
    out, gate = cluster.folder / "work" / "array", cluster.folder / "work" / "array-gate"
    gate.mkdir()
    # Every element waits at the gate, so that how many are there at once does not depend on how fast they are.
    wait = f"touch {gate}/$SLURM_ARRAY_TASK_ID; until [ -e {gate}/open ]; do sleep 0.1; done"
    arguments = [script("prep"), *prep_arguments(corpus, out)]
    job = submit(cluster, "--array=0-3%2", "--output=prep-array-%a.out", *arguments, MOR_SETUP=wait)

    def states() -> list[str]:
        return sorted(cluster.run("squeue", "-h", "-r", "-j", job, "-o", "%T %r").stdout.splitlines())

    limited = ["PENDING JobArrayTaskLimit"] * 2 + ["RUNNING None"] * 2
    cluster.until(lambda: "yes" if states() == limited and len(list(gate.iterdir())) == 2 else None, "two at the gate")
    (gate / "open").touch()
    cluster.until(lambda: "yes" if (out / "manifest.json").is_file() else None, "the merged data set")
    elements = [cluster.interval(f"{job}_{index}") for index in range(4)]
    assert most_at_once(elements) == 2
    logs = "".join(file.read_text() for file in (cluster.folder / "work").glob("prep-array-*.out"))
    (merge,) = re.findall(r"job (\d+) does `merge", logs)
    assert cluster.wait(merge) == "COMPLETED"
    assert cluster.interval(merge)[0] >= max(end for _, end in elements)
    assert shards(out) == shards(prepared)


@pytest.mark.slow
def test_mpi_ranks_make_what_one_process_makes(cluster, corpus, prepared):
    probe = cluster.run("srun", "--mpi=pmix", "true", check=False)
    if probe.returncode:
        skip_or_fail(
            f"Slurm cannot start MPI programs through PMIx (Debian: apt-get install libpmix-dev): {probe.stderr}"
        )
    out = cluster.folder / "work" / "mpi"
    job = submit(
        cluster,
        "--nodes=2",
        "--ntasks-per-node=2",
        "--output=prep-mpi.out",
        script("prep"),
        *prep_arguments(corpus, out),
        # Two nodes on one host: what they would share over the memory they do not have in common.
        OMPI_MCA_btl="self,tcp",
        OMPI_MCA_btl_tcp_if_include="lo",
    )
    assert cluster.wait(job) == "COMPLETED", cluster.logs()
    assert shards(out) == shards(prepared)


@pytest.mark.slow
def test_an_experiment_as_an_array_of_arms(cluster, corpus, prepared):
    folder = cluster.folder / "work" / "runs" / "array-experiment"
    experiment = write_experiment(cluster.folder / "work" / "array-experiment.yaml", folder, prepared)
    job = submit(cluster, "--array=0-1%1", "--output=compare-%a.out", script("compare"), str(experiment))
    cluster.until(lambda: "yes" if len(finished(folder)) == 2 else None, "two trained arms")
    cluster.until(lambda: "yes" if (folder / "report" / "report.csv").is_file() else None, "the report")
    cluster.until(lambda: "empty" if not cluster.run("squeue", "-h").stdout.strip() else None, "an empty queue")
    assert cluster.wait(f"{job}_0") == cluster.wait(f"{job}_1") == "COMPLETED", cluster.logs()
    assert most_at_once([cluster.interval(f"{job}_{element}") for element in range(2)]) == 1
    table = (folder / "report" / "report.csv").read_text()
    assert "vanilla" in table and "mor" in table


@pytest.mark.slow
def test_evaluations_are_shared_out_over_an_array(cluster, corpus, prepared):
    folder = cluster.folder / "work" / "runs" / "array-experiment"
    runs = [str(folder / name) for name in finished(folder)]
    if len(runs) != 2:
        pytest.skip("needs the runs of the test before")
    for name in finished(folder):
        for file in (folder / name / "evaluation").glob("*.json"):
            file.unlink()
    job = submit(
        cluster,
        "--array=0-3",
        "--output=eval-%a.out",
        script("eval"),
        *runs,
        "--suite",
        "perplexity",
        "--suite=routing",
    )
    for element in range(4):
        assert cluster.wait(f"{job}_{element}") == "COMPLETED", cluster.logs()
    for name in finished(folder):
        assert {file.stem for file in (folder / name / "evaluation").glob("*.json")} == {"perplexity", "routing"}


def write_experiment(file: Path, folder: Path, data: Path) -> Path:
    """Two arms of some thousand parameters, twelve steps each."""
    shape = {"num_layers": 5, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
    values = {
        "name": "tiny",
        "runs": str(folder),
        "data": {"path": str(data)},
        "launch": {"launcher": "python", "ranks": 1},
        "base": {
            "seed": 1,
            "model": {**shape, "context_length": 64},
            "budget": {"steps": 12},
            "batch": {"sequences": 8, "micro_batch": 4, "sequence_length": 64},
            "precision": "fp32",
            "deepspeed": {"config": "zero1"},
            "evaluation": {"every": 6, "sequences": 4},
        },
        "arms": {
            "vanilla": {},
            "mor": {"model": {"sharing": "middle_cycle", "recursions": 3, "router": {"kind": "expert_choice"}}},
        },
        "evaluation": {"suites": ["perplexity", "routing"], "text_bytes": 4000},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def finished(folder: Path) -> list[str]:
    """Names of the experiment's finished runs."""
    states = {file.parent.name: json.loads(file.read_text())["state"] for file in folder.glob("*/status.json")}
    return sorted(name for name, state in states.items() if state == "finished")
