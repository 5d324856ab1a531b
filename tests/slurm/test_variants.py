"""The same scripts with modules, conda and containers, chosen by MOR_SETUP and MOR_CONTAINER."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretrain.support import ROOT, losses
from tests.slurm.cluster import JOB_PATH, script
from tests.slurm.corpus import prep_arguments
from tests.slurm.stand_ins import make_apptainer, make_modules, make_pyxis, start_python_with
from tests.slurm.test_tasks import shards
from tests.slurm.training import log, submit

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
# No `python` here: Debian has `python3` alone.
BARE_PATH = "/usr/local/bin:/usr/bin:/bin"


def lines(record: Path) -> list[str]:
    return record.read_text(encoding="utf-8").splitlines()


def test_modules_and_conda_bring_python_and_apptainer_runs_it(cluster, corpus, prepared, tmp_path):
    modules, calls = tmp_path / "modules.txt", make_apptainer(tmp_path)
    setup = f". {make_modules(tmp_path, modules)}; module load cuda/12; conda activate mor"
    out = cluster.work / "in-container"
    environ = {"MOR_SETUP": setup, "MOR_CONTAINER": "/images/mor.sif", "INSIDE": "nothing"}
    environ["PATH"] = f"{tmp_path / 'bin'}:{BARE_PATH}"
    job = cluster.submit("--output=in-container.out", script("prep"), *prep_arguments(corpus, out), **environ)
    assert cluster.wait(job) == "COMPLETED", cluster.logs()
    assert lines(modules) == ["module load cuda/12", "conda activate mor"]
    (call,) = lines(calls)
    assert f"exec --nv --bind {ROOT},{cluster.work} /images/mor.sif python -u -m pretrain.cli.main" in call
    assert shards(out) == shards(prepared)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_every_rank_trains_in_apptainer(cluster, recipes, undisturbed, tmp_path, launcher):
    calls = make_apptainer(tmp_path)
    recipe, run = recipes(f"apptainer-{launcher}")
    job = submit(
        cluster, recipe, PATH=f"{tmp_path / 'bin'}:{JOB_PATH}", MOR_CONTAINER="/images/mor.sif", MOR_LAUNCHER=launcher
    )
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    assert losses(run) == undisturbed
    assert json.loads((run / "environment.json").read_text())["launcher"] == launcher
    if launcher == "deepspeed":
        assert (run.parent / f".{run.name}.hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    ranks = sorted(call.split()[0] for call in lines(calls) if "pretrain.cluster.rank" in call)
    assert ranks == ["0", "1"]


@pytest.mark.slow
def test_every_rank_trains_in_enroot(cluster, recipes, undisturbed, tmp_path):
    calls = make_pyxis(tmp_path)
    recipe, run = recipes("enroot")
    job = submit(cluster, recipe, PATH=f"{tmp_path / 'bin'}:{JOB_PATH}", MOR_CONTAINER="/images/mor.sqsh")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    assert losses(run) == undisturbed
    work = cluster.work
    where, ranks = lines(calls)
    assert "pretrain.cluster.locate" in where and "pretrain.cluster.rank" in ranks
    for call in (where, ranks):
        words = call.split()
        assert {"--container-image=/images/mor.sqsh", f"--container-workdir={work}"} <= set(words)
        (mounts,) = (word.partition("=")[2] for word in words if word.startswith("--container-mounts="))
        assert set(mounts.split(",")) == {f"{ROOT}:{ROOT}", f"{work}:{work}"}


@pytest.mark.slow
def test_the_end_is_announced_into_enroot_too(cluster, corpus, prepared, tmp_path):
    make_pyxis(tmp_path)
    out = cluster.work / "in-enroot"
    # Preparation waits at its first import until it is interrupted; the second start finds the gate open.
    hold = start_python_with(
        tmp_path / "hold",
        "import os, pathlib, sys, time\n"
        f"gate = pathlib.Path({str(tmp_path)!r})\n"
        "if os.environ.get('INSIDE') == 'pyxis' and not (gate / 'open').exists():\n"
        "    (gate / 'waits').touch()\n"
        "    try:\n"
        "        while True:\n"
        "            time.sleep(0.1)\n"
        "    except KeyboardInterrupt:\n"
        "        (gate / 'open').touch()\n"
        "        os._exit(130)\n",
    )
    environ = {"MOR_CONTAINER": "/images/mor.sqsh", "PATH": f"{tmp_path / 'bin'}:{JOB_PATH}", "PYTHONPATH": hold}
    job = cluster.submit("--output=in-enroot.out", script("prep"), *prep_arguments(corpus, out), **environ)
    cluster.until((tmp_path / "waits").exists, "preparation to wait")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.logs()
    assert cluster.show(job)["Restarts"] == "1"
    assert shards(out) == shards(prepared)
