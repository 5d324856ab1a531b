"""Ranks from every launcher's variables, and the same ranks from the launchers themselves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks import environment, toolchain
from pretrain.ranks.environment import clean_environment, discover_ranks, rendezvous_port
from pretrain.ranks.hostlist import expand_hostlist
from tests.conftest import skip_or_fail
from tests.ports import free_port

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "localhost,other[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-77@1",
    "PMIX_RANK": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
TORCH = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "2900",
}
TORCHRUN = {**TORCH, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {**TORCH, "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0, 1, "127.0.0.1", "python")),
        (SRUN, (3, 5, 1, 2, "localhost", "srun")),
        (OPENMPI, (2, 4, 2, 4, "127.0.0.1", "openmpi")),
        (HYDRA, (1, 3, 1, 3, "127.0.0.1", "hydra")),
        (TORCHRUN, (5, 8, 1, 4, "head", "torchrun")),
        (DEEPSPEED, (5, 8, 1, 4, "head", "deepspeed")),
        ({**TORCH, "LOCAL_WORLD_SIZE": "2"}, (5, 8, 1, 2, "head", "environment")),
        # Nested: one torchrun per node under srun, under mpirun; mpirun whose daemons srun started.
        ({**SRUN, **TORCHRUN}, (5, 8, 1, 4, "head", "torchrun")),
        ({**OPENMPI, **DEEPSPEED}, (5, 8, 1, 4, "head", "deepspeed")),
        ({**SRUN, **OPENMPI}, (2, 4, 2, 4, "127.0.0.1", "openmpi")),
        # The usual `export RANK=$SLURM_PROCID` of job scripts agrees with Slurm.
        ({**SRUN, **TORCH, "RANK": "3", "WORLD_SIZE": "5"}, (3, 5, 1, 5, "head", "srun")),
        # srun --mpi=pmi2 sets PMI_* beside its own.
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "5"}, (3, 5, 1, 2, "localhost", "srun")),
        # Inside a batch script or an interactive step a plain program runs once, whatever the job's number of tasks.
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x999999999)"}, (3, 5, 1, 2, "localhost", "srun")),
        ({**SRUN, "SLURM_STEP_ID": "4294967291"}, (0, 1, 0, 1, "127.0.0.1", "python")),
        ({name: value for name, value in SRUN.items() if "STEP" not in name}, (0, 1, 0, 1, "127.0.0.1", "python")),
    ],
)
def test_ranks_of_each_launcher(environ, expected):
    ranks = discover_ranks(environ)
    found = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.master_address)
    assert (*found, ranks.launcher) == expected


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, "MASTER_PORT"),
        ({**TORCH, "RANK": "8"}, "RANK=8"),
        ({**TORCH, "RANK": "one"}, "RANK='one'"),
        ({**TORCH, "RANK": ""}, "RANK=''"),
        ({**TORCH, "RANK": "\u0665"}, "RANK='\u0665'"),  # an Arabic five, which int() reads
        ({**TORCH, "RANK": "1_0"}, "RANK='1_0'"),
        ({**TORCH, "RANK": "-1"}, "RANK=-1"),
        ({**TORCH, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
        ({**TORCH, "MASTER_ADDR": "head\x1b[31m"}, "MASTER_ADDR"),
        ({**TORCH, "MASTER_ADDR": "head node"}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_PROCID": "\u00b2"}, "SLURM_PROCID"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "1"}, "unset RANK"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "unset RANK"),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, "PMIX_RANK"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALNRANKS"),
        ({**SRUN, "SLURM_STEP_NODELIST": "no-such-host-[1-3]", "PATH": ""}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_NODELIST": "broken[1-"}, "host list"),
    ],
)
def test_what_cannot_be_known_is_said_and_not_awaited(environ, word, monkeypatch):
    resolve = socket.getaddrinfo

    def resolve_known(host, *more):
        if host.startswith("no-such-host"):  # to which some networks give an address all the same
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_known)
    with pytest.raises(LaunchError, match=word.replace("[", r"\[")):
        discover_ranks(environ)


def test_a_task_that_sees_only_its_own_gpu_uses_that_one():
    assert discover_ranks(SRUN).device == 1
    assert discover_ranks({**SRUN, "CUDA_VISIBLE_DEVICES": "3"}).device == 0
    assert discover_ranks({**SRUN, "CUDA_VISIBLE_DEVICES": "2,3"}).device == 1


def test_the_port_belongs_to_the_job_the_step_and_the_restart():
    ranks = [{**SRUN, "SLURM_PROCID": str(rank)} for rank in range(5)]
    assert len({discover_ranks({**environ, "SLURM_LOCALID": "0"}).master_port for environ in ranks}) == 1
    ports = [rendezvous_port({"SLURM_JOB_ID": str(job)}) for job in range(1000, 1500)]
    assert len(set(ports)) > 480, "neighbouring jobs on one host need different ports"
    assert all(1024 < port < 32768 for port in ports)
    assert rendezvous_port(SRUN) != rendezvous_port({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert rendezvous_port(SRUN) != rendezvous_port({**SRUN, "SLURM_STEP_ID": "1"})
    assert rendezvous_port({}) is None
    ports = [discover_ranks({}).master_port for _ in range(50)]
    assert all(1024 < port < 32768 for port in ports), "Linux gives the others to whoever connects"
    assert len(set(ports)) > 40, "a run alone takes a free one"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b.c", ["a", "b.c"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,20],login", ["n08", "n09", "n10", "n11", "n20", "login"]),
        ("r[1-2]n[01-02]x", ["r1n01x", "r1n02x", "r2n01x", "r2n02x"]),
        ("a" + "[1]" * 3000, ["a" + "1" * 3000]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_host_lists(text, hosts):
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("a,,b", "empty"),
        ("a[1", "brackets"),
        ("a]1[", "brackets"),
        ("a[[1]]", "brackets"),
        ("a[x]", "neither a number nor a range"),
        ("a[1\n]b[\u0661]", "neither a number nor a range"),
        ("a b", "part of a host's name"),
        ("\x1b[1]", "part of a host's name"),
        ("a[5-1]", "ends before it begins"),
        ("a[0-99999999]", "more than 65,536 hosts"),
        ("a[1-300][1-300]", "more than 65,536 hosts"),
        ("a[1-40000],b[1-40000]", "more than 65,536 hosts"),
        ("a" + "[1-60000]" * 1000, "more than 65,536 hosts"),
        ("a[" + ",".join(["1-60000"] * 1000) + "]", "more than 65,536 hosts"),
        ("a" + "[2-3]" * 10 + "[1]" * 20_000, "names are longer"),
        ("a" * 100_000 + "[1-999]", "names are longer"),
        (f"a[{'9' * 5000}]", "digits"),
        (f"a[1-{'9' * 5000}]", "digits"),
        (f"a[{'0' * 5000}1]", "digits"),
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_what_is_no_host_list(text, problem):
    with pytest.raises(LaunchError, match=f"(?s)is not a Slurm host list: .*{problem}") as refusal:
        expand_hostlist(text)
    assert len(str(refusal.value)) < 500 and "\x1b" not in str(refusal.value)


def test_host_lists_are_read_as_slurm_reads_them(tmp_path):
    if not shutil.which("scontrol"):
        skip_or_fail("scontrol is not installed (Debian: slurm-client)")
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    environ = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    for text in ("n[1-3]", "n[08-11,20],login", "r[1-2]n[01-02]", "gpu[001-003,7]"):
        command = ["scontrol", "show", "hostnames", text]
        shown = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        assert expand_hostlist(text) == shown.stdout.split()


def test_a_program_of_its_own_inherits_no_ranks():
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"}
    assert clean_environment({**kept, **SRUN, **OPENMPI, **HYDRA, **TORCHRUN, **DEEPSPEED}) == kept


WHO = """
import json, os, sys
from pretrain.ranks.environment import prepare_environment
ranks = prepare_environment()
assert prepare_environment() == ranks, "a second call must find the same"
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
total = torch.tensor([float(ranks.rank + 1)])
torch.distributed.all_reduce(total)
with open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as stream:
    json.dump({**ranks.__dict__, "total": total.item(), "mpi4py": "mpi4py" in sys.modules}, stream)
torch.distributed.destroy_process_group()
"""
LAUNCHERS = {
    "python": ([sys.executable], 1),
    "torchrun": (["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())], 2),
    "deepspeed": (["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank"], 2),
    "openmpi": (["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable], 2),
}


def bare_environment() -> dict[str, str]:
    """What a fresh login shell has: nothing of this test's own."""
    names = ("HOME", "LANG", "TMPDIR", "TORCH_EXTENSIONS_DIR", "OMPI_ALLOW_RUN_AS_ROOT", "PYTHONDONTWRITEBYTECODE")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_for_real(launcher, tmp_path):
    command, size = LAUNCHERS[launcher]
    if not shutil.which(command[0]):
        skip_or_fail(f"{command[0]} is not installed (pip install 'mor-pretrain[mpi]' brings mpirun)")
    script = tmp_path / "who.py"
    script.write_text(WHO)
    command = [*command, str(script), str(tmp_path)]
    done = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(seen) == size
    # DeepSpeed must not load mpi4py: it would look for its own ranks.
    everywhere = {"world_size": size, "local_world_size": size, "launcher": launcher, "mpi4py": False}
    for rank, who in enumerate(seen):
        assert who.items() >= {**everywhere, "rank": rank, "local_rank": rank, "total": size * (size + 1) / 2}.items()


def test_mpirun_over_several_hosts_agrees_through_mpi():
    if not shutil.which("mpirun"):
        skip_or_fail("mpirun is not installed (pip install 'mor-pretrain[mpi]' brings it)")
    # As if the other rank were on another host: one rank per node.
    where = (
        "import os\n"
        "os.environ.update(OMPI_COMM_WORLD_LOCAL_RANK='0', OMPI_COMM_WORLD_LOCAL_SIZE='1')\n"
        "from pretrain.ranks.environment import discover_ranks\n"
        "ranks = discover_ranks()\n"
        "print('WHERE', ranks.rank, ranks.master_address, ranks.master_port, flush=True)\n"
    )
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", where]
    done = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, timeout=300)
    lines = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("WHERE"))
    assert [line[0] for line in lines] == ["0", "1"], done.stdout + done.stderr
    assert lines[0][1:] == lines[1][1:]


def test_a_child_does_not_take_its_parents_place(monkeypatch):
    monkeypatch.setattr(os, "environ", {**bare_environment(), **TORCHRUN})
    monkeypatch.setattr(environment, "discover_ranks", lambda: discover_ranks(TORCHRUN))
    environment.prepare_environment()
    show = "from pretrain.ranks.environment import discover_ranks; print(discover_ranks())"
    done = subprocess.run([sys.executable, "-c", show], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Ranks(rank=0, world_size=1,") and "launcher='python'" in done.stdout


def test_the_toolchain_needs_nothing_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ, PATH=os.defpath, XDG_CACHE_HOME=str(tmp_path)))
    for name in ("TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    monkeypatch.setattr(toolchain, "accelerator_present", lambda: False)
    toolchain.prepare_toolchain()
    assert shutil.which("ninja", path=os.environ["PATH"])
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).is_absolute()


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_no_accelerator(visible):
    assert not toolchain.accelerator_present({"CUDA_VISIBLE_DEVICES": visible})


def test_a_killed_builders_lock_is_removed_and_a_living_ones_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    dead, alive = tmp_path / "cpu_adam" / "lock", tmp_path / "fused" / "lock"
    for lock in (dead, alive):
        lock.parent.mkdir()
        lock.touch()
    with alive.open("r"):
        toolchain.prepare_toolchain(shared_host=False)
        assert dead.exists(), "its builder may live on another host"
        toolchain.prepare_toolchain(shared_host=True)
        assert not dead.exists()
        assert alive.exists()
    os.utime(alive, (1, 1))
    toolchain.prepare_toolchain(shared_host=False)
    assert not alive.exists(), "no build lasts that long"

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    dead.touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LaunchError, match=f"{dead}: .*Permission denied"):
        toolchain.prepare_toolchain()


def test_a_user_without_a_home_builds_too_but_not_where_others_write(tmp_path, monkeypatch):
    """What lies in the build folder is loaded: in /tmp somebody else may have put it there."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        toolchain.prepare_toolchain()
    (own,) = tmp_path.iterdir()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).is_relative_to(own)
    os.environ.pop("TORCH_EXTENSIONS_DIR")
    own.chmod(0o777)
    with pytest.raises(LaunchError, match=f"{own}: .*TORCH_EXTENSIONS_DIR"):
        toolchain.prepare_toolchain()
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match=f"{own}: .*TORCH_EXTENSIONS_DIR"):
        toolchain.prepare_toolchain()


@pytest.mark.parametrize(("chosen", "threads"), [({}, "16"), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_threads_are_shared_among_the_ranks_of_a_node(chosen, threads, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], **chosen})
    monkeypatch.setattr(environment, "discover_ranks", lambda: discover_ranks(TORCHRUN))
    monkeypatch.setattr(environment, "_usable_cores", lambda: 64)
    environment.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == threads
