"""This process's rank, how many ranks there are and where they meet, from the variables of whatever started it.

`prepare_environment()` is the first line of every training entry point. It finds rank, world size and meeting place
from deepspeed, torchrun, srun, mpirun (Open MPI, MPICH/Hydra, MVAPICH) or no launcher, and sets the variables that
torch and DeepSpeed read. A missing variable is an error that names it: with a guess, ranks would wait for one another
for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.plain_text import plain
from pretrain.errors import LaunchError
from pretrain.ranks.hostlist import expand_hostlist, shown
from pretrain.ranks.toolchain import prepare_toolchain

_LOG = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHED_VARIABLES = (*_TORCH_VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
# Says what prepare_environment() set and in which process, so that a child does not use its parent's rank.
_MARKER = "MOR_RANKS"
# Ports below the range that Linux hands out by itself (32768-60999), above the usual services.
_FIRST_PORT, _PORTS, _TRIES = 15000, 14000, 100
# Slurm numbers its own steps (batch script, interactive shell, ...) from here on; smaller numbers are srun's.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
# Variables of rank, world size, rank on the node and ranks on the node.
_MPI_LAUNCHERS = {
    "openmpi": [f"OMPI_COMM_WORLD_{name}" for name in _PLACE],
    "mvapich": [f"MV2_COMM_WORLD_{name}" for name in _PLACE],
    "hydra": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
}
_INTEGER = re.compile(r"-?[0-9]{1,10}")
# `2(x3)`: two tasks on each of three nodes.
_TASKS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
_RANK_PREFIXES = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MV2_", "MPI_LOCAL", "TORCHELASTIC_", "PRTE_", "HYDI_", "HYDRA_")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run.

    `rank` is 0 .. world_size-1; `local_rank` is 0 .. local_world_size-1 on this node; `device` is the accelerator's
    index among those this process can see, which is 0 where the launcher shows each process only its own.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: int
    master_address: str
    master_port: int
    launcher: str


def prepare_environment() -> Ranks:
    """Find this process's ranks and set everything torch and DeepSpeed read from the environment. Safe to call twice.

    Raises:
        LaunchError: when the variables contradict one another, or the launcher's are incomplete.
    """
    ranks = discover_ranks()
    prepare_toolchain(shared_host=ranks.local_world_size == ranks.world_size)
    # All of them: if one is missing, DeepSpeed looks for MPI.
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.device),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        MASTER_ADDR=ranks.master_address,
        MASTER_PORT=str(ranks.master_port),
    )
    if ranks.launcher != "torchrun":
        # Inherited from a parent under torchrun, this makes torch wait for a store that nobody serves.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ[_MARKER] = f"{os.getpid()} {ranks.launcher} {ranks.local_rank} {_fingerprint(os.environ)}"
    if ranks.world_size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _usable_cores() // ranks.local_world_size)))
    if ranks.master_address == LOOPBACK and Path("/sys/class/net/lo").exists():
        # All ranks are on this host; a host name that does not resolve must not stop gloo.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return ranks


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A copy without this process's ranks, for a program that is to be no rank of this run."""
    dropped = {*_LAUNCHED_VARIABLES, _MARKER, "GROUP_RANK"}
    if environ.get("GLOO_SOCKET_IFNAME") == "lo":
        dropped.add("GLOO_SOCKET_IFNAME")  # right for ranks of one host only
    dropped |= {name for name in environ if name.startswith(_RANK_PREFIXES)} - {"SLURM_CONF"}
    return {name: value for name, value in environ.items() if name not in dropped}


def discover_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """This process's ranks from the launcher's variables; changes nothing.

    The order matters where launchers are nested: torchrun and deepspeed come before mpirun and srun, and mpirun (whose
    daemons srun starts inside a Slurm job) before srun.

    Raises:
        LaunchError: when the variables contradict one another, or the launcher's are incomplete.
    """
    environ, own = _without_parents_place(environ)
    found = _from_mpi(environ) or _from_slurm(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        explicit = _from_torch_variables(environ, own)
        if found and explicit.launcher == "environment":
            if (found.rank, found.world_size) != (explicit.rank, explicit.world_size):
                raise LaunchError(
                    f"RANK={explicit.rank} and WORLD_SIZE={explicit.world_size} are set, but {found.launcher} started "
                    f"this process as rank {found.rank} of {found.world_size}; unset RANK and WORLD_SIZE "
                    "(they come from your shell or job script)."
                )
            return replace(explicit, launcher=found.launcher)
        return explicit
    if found:
        return found
    if "PMIX_RANK" in environ:
        raise LaunchError(
            f"PMIX_RANK={shown(environ['PMIX_RANK'])} says that a PMIx launcher started this process, but nothing says "
            "of how many; set WORLD_SIZE, RANK and LOCAL_RANK, or start with mpirun, srun or torchrun."
        )
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and _INTEGER.fullmatch(tasks) and int(tasks) > 1:
        _LOG.warning("This Slurm job has %s tasks but this process was started without srun, so it runs alone.", tasks)
    return Ranks(0, 1, 0, 1, 0, _address(environ) or LOOPBACK, _port(environ, free_port()), "python")


def rendezvous_port(environ: Mapping[str, str]) -> int | None:
    """A port that all processes of this job derive alike, and other jobs hardly ever; None outside a job.

    The step and the restart are part of it: steps of one job run beside one another, and a requeued job's old
    processes may live on for some seconds.
    """
    job = next((environ[name] for name in _JOB_ID_VARIABLES if environ.get(name)), None)
    if job is None:
        return None
    return _derived_port(f"{job} {environ.get('SLURM_STEP_ID', '')} {environ.get('SLURM_RESTART_COUNT', '0')}")


def _derived_port(key: str) -> int:
    # A variable may hold bytes that are no UTF-8.
    return _FIRST_PORT + zlib.crc32(key.encode("utf-8", "surrogatepass")) % _PORTS


def _without_parents_place(environ: Mapping[str, str]) -> tuple[Mapping[str, str], tuple[str, int] | None]:
    """`environ` without the ranks that a parent process has set for itself; launcher and local rank, if this process
    has set them.
    """
    marker = environ.get(_MARKER, "").split(" ", 3)
    if len(marker) != 4 or not _INTEGER.fullmatch(marker[2]) or marker[3] != _fingerprint(environ):
        return environ, None
    if marker[0] == str(os.getpid()):
        return environ, (marker[1], int(marker[2]))
    ours = {*_LAUNCHED_VARIABLES, "TORCHELASTIC_RUN_ID"}
    return {name: value for name, value in environ.items() if name not in ours}, None


def _fingerprint(environ: Mapping[str, str]) -> str:
    return " ".join(environ.get(name, "-") for name in _TORCH_VARIABLES)


def _from_torch_variables(environ: Mapping[str, str], own: tuple[str, int] | None) -> Ranks:
    world_size = _integer(environ, "WORLD_SIZE", minimum=1)
    rank = _integer(environ, "RANK", below=world_size)
    alone = world_size == 1
    if own:
        launcher = own[0]
    elif "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        launcher = "deepspeed"
    else:
        launcher = "environment"
    local_size_name = "LOCAL_SIZE" if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    local_world_size = _integer(environ, local_size_name, default=world_size, minimum=1)
    if own:
        local_rank, device = own[1], _integer(environ, "LOCAL_RANK")
    else:
        local_rank = _integer(environ, "LOCAL_RANK", default=0 if alone else None, below=local_world_size)
        device = _device(environ, local_rank)
    address = _address(environ) or (LOOPBACK if alone else None)
    if address is None:
        raise LaunchError(
            f"WORLD_SIZE={world_size} and RANK={rank} are set, but not MASTER_ADDR; set it to the host of rank 0."
        )
    port = _port(environ, rendezvous_port(environ) or (free_port() if alone else None))
    return Ranks(rank, world_size, local_rank, local_world_size, device, address, port, launcher)


def _from_mpi(environ: Mapping[str, str]) -> Ranks | None:
    # One of the two is enough to know the launcher; if the other is missing, reading it raises below.
    found = (name for name, (rank, size, *_) in _MPI_LAUNCHERS.items() if rank in environ or size in environ)
    launcher = next(found, None)
    if launcher is None:
        return None
    rank_name, size_name, local_rank_name, local_size_name = _MPI_LAUNCHERS[launcher]
    if launcher == "hydra" and _in_srun_step(environ) and local_rank_name not in environ:
        return None  # srun --mpi=pmi2 sets PMI_RANK too; its own variables say more
    world_size = _integer(environ, size_name, minimum=1)
    rank = _integer(environ, rank_name, below=world_size)
    alone = world_size == 1
    local_world_size = _integer(environ, local_size_name, default=1 if alone else None, minimum=1)
    local_rank = _integer(environ, local_rank_name, default=0 if alone else None, below=local_world_size)
    port = rendezvous_port(environ)
    address = _address(environ) or _first_host(environ, all_here=local_world_size == world_size)
    if address is None:
        address, port = _agree_through_mpi(rank, world_size, port)
    if port is None:
        # mpirun's own name for this run, the same in all its processes.
        port = _derived_port(environ.get("PMIX_NAMESPACE") or environ.get("PMI_JOBID") or "")
    port = _port(environ, port)
    return Ranks(rank, world_size, local_rank, local_world_size, _device(environ, local_rank), address, port, launcher)


def _from_slurm(environ: Mapping[str, str]) -> Ranks | None:
    if not _in_srun_step(environ):
        return None
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _integer(environ, size_name, minimum=1)
    rank = _integer(environ, "SLURM_PROCID", below=world_size)
    node = _integer(environ, "SLURM_NODEID", default=0)
    local_world_size = _tasks_of_node(environ, node) or world_size
    local_rank = _integer(environ, "SLURM_LOCALID", below=local_world_size)
    address = _address(environ) or _first_host(environ, all_here=local_world_size == world_size)
    if address is None:
        raise LaunchError(
            "srun started this process on several nodes, but SLURM_STEP_NODELIST is not set; set MASTER_ADDR."
        )
    port = _port(environ, rendezvous_port(environ))
    return Ranks(rank, world_size, local_rank, local_world_size, _device(environ, local_rank), address, port, "srun")


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and bool(_INTEGER.fullmatch(step)) and 0 <= int(step) < _FIRST_SPECIAL_STEP


def _tasks_of_node(environ: Mapping[str, str], node: int) -> int | None:
    """`2(x3),1`: 2 on nodes 0 to 2, and 1 on node 3; None where nothing says."""
    name = "SLURM_STEP_TASKS_PER_NODE" if environ.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
    text = environ.get(name) or ""
    for part in text.split(",") if text else ():
        match = _TASKS.fullmatch(part)
        if match is None:
            raise LaunchError(f"{name}={shown(text)!r} is not a list of tasks per node, such as 2(x3),1; unset it.")
        if node < int(match[2] or 1):
            return int(match[1])
        node -= int(match[2] or 1)
    return None


def _first_host(environ: Mapping[str, str], *, all_here: bool) -> str | None:
    """Where rank 0 is: on this host, or on the first of Slurm's; None if unknown."""
    if all_here:
        return LOOPBACK
    names = environ.get("SLURM_STEP_NODELIST") if _in_srun_step(environ) else None
    names = names or environ.get("SLURM_JOB_NODELIST")
    return reachable_address(expand_hostlist(names)[0]) if names else None


def _address(environ: Mapping[str, str]) -> str:
    """MASTER_ADDR, empty where it is not set."""
    address = environ.get("MASTER_ADDR", "")
    if len(address) > 255 or plain(address) != address or any(letter.isspace() for letter in address):
        raise LaunchError(f"MASTER_ADDR={shown(address)!r} is neither a host name nor an address; set it to rank 0's.")
    return address


def reachable_address(host: str) -> str:
    """`host`, or the address Slurm knows it by when its name does not resolve."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except (OSError, ValueError):  # ValueError: no host can have that name
        pass
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        command = ["scontrol", "show", "node", host]
        record = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        if known := re.search(r"\bNodeAddr=(\S+)", record):
            socket.getaddrinfo(known[1], None)
            return known[1]
    raise LaunchError(
        f"The name of rank 0's node, {shown(host)}, does not resolve from {socket.gethostname()}; "
        "set MASTER_ADDR to its address."
    )


def _agree_through_mpi(rank: int, world_size: int, port: int | None) -> tuple[str, int]:
    """Rank 0's host name and a free port of it, from MPI; for mpirun over several hosts outside Slurm."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            "mpirun started ranks on several hosts and mpi4py, which could tell them where to meet, does not load "
            f"({error}); set MASTER_ADDR to the host of rank 0 (mpirun -x MASTER_ADDR=...)."
        ) from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, world_size):
        raise LaunchError(
            f"mpirun started rank {rank} of {world_size}, but mpi4py's MPI sees rank {world.Get_rank()} of "
            f"{world.Get_size()}: they belong to different MPI libraries. Set MASTER_ADDR to the host of rank 0, "
            "or use mpi4py's own mpirun."
        )
    address, agreed = world.bcast((socket.gethostname(), port or free_port()) if rank == 0 else None)
    return address, agreed


def _device(environ: Mapping[str, str], local_rank: int) -> int:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if environ.get(name) and "," not in environ[name]:
            return 0
    return local_rank


def _integer(
    environ: Mapping[str, str], name: str, *, default: int | None = None, minimum: int = 0, below: int | None = None
) -> int:
    """An integer variable from `minimum` to `below` - 1; `default` where it is not set.

    Raises:
        LaunchError: it is not set and has no default, is no integer, or lies outside.
    """
    text = environ.get(name, None if default is None else str(default))
    if text is None:
        others = "although the launcher's other variables are"
        raise LaunchError(f"{name} is not set {others}; set it, or start with mor, torchrun or srun.")
    value = read_integer(name, text)
    if value < minimum or (below is not None and value >= below):
        limit = f"between {minimum} and {below - 1}" if below is not None else f"at least {minimum}"
        raise LaunchError(f"{name}={value} does not fit the launcher's other variables: expected {limit}.")
    return value


def read_integer(name: str, text: str, largest: int = 2**31 - 1) -> int:
    """The value of an integer variable that a launcher sets.

    Raises:
        LaunchError: it is anything else, or beyond `largest`, which is what launchers count to.
    """
    if not _INTEGER.fullmatch(text) or abs(int(text)) > largest:
        raise LaunchError(f"{name}={shown(text)!r} is not an integer that a launcher sets; set it right, or unset it.")
    return int(text)


def _port(environ: Mapping[str, str], derived: int | None) -> int:
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT", minimum=1, below=65536)
    if derived is None:
        raise LaunchError(
            "RANK, WORLD_SIZE and MASTER_ADDR are set, but not MASTER_PORT; set it to a free port of MASTER_ADDR, "
            "alike on all ranks."
        )
    return derived


def free_port() -> int:
    """A port of this host for ranks that start now: not one that Linux gives to a connection meanwhile.

    Raises:
        LaunchError: none was found.
    """
    for _ in range(_TRIES):
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise LaunchError(f"{_TRIES} ports of {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} are taken; set MASTER_PORT.")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
