"""If any one variable of a launcher is missing, all ranks draw the same conclusion, so that none waits for ever."""

from __future__ import annotations

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks.environment import Ranks, discover_ranks


def texts(prefix: str = "", **values: object) -> dict[str, str]:
    return {prefix + name: str(value) for name, value in values.items()}


def srun(rank: int) -> dict[str, str]:
    """Two nodes of two tasks."""
    hosts, tasks = "localhost,ip6-localhost", "2(x2)"
    job = {"JOB_ID": 4711, "NTASKS": 4, "JOB_NODELIST": hosts, "TASKS_PER_NODE": tasks}
    step = {"STEP_ID": 0, "STEP_NUM_TASKS": 4, "STEP_NODELIST": hosts, "STEP_TASKS_PER_NODE": tasks}
    return texts("SLURM_", **job, **step, PROCID=rank, NODEID=rank // 2, LOCALID=rank % 2)


def pmix(rank: int) -> dict[str, str]:
    """srun --mpi=pmix, as Slurm 22.05 sets it."""
    return srun(rank) | texts("PMIX_", RANK=rank, NAMESPACE="slurm.pmix.4711.0", HOSTNAME="localhost")


def pmi2(rank: int) -> dict[str, str]:
    """srun --mpi=pmi2."""
    return srun(rank) | texts("PMI_", RANK=rank, SIZE=4, JOBID="4711.0")


def openmpi(rank: int, per_node: int = 4) -> dict[str, str]:
    """mpirun of Open MPI 5, by default on one host."""
    place = texts("OMPI_COMM_WORLD_", RANK=rank, SIZE=4, LOCAL_RANK=rank % per_node, LOCAL_SIZE=per_node)
    return place | texts("PMIX_", NAMESPACE="prterun-host-77@1", RANK=rank)


def openmpi_in_a_job(rank: int) -> dict[str, str]:
    """mpirun of Open MPI in a Slurm job of two nodes: its daemons are srun's tasks."""
    daemons = {"NTASKS": 2, "STEP_NUM_TASKS": 2, "STEP_TASKS_PER_NODE": "1(x2)", "PROCID": rank // 2, "LOCALID": 0}
    return srun(rank) | texts("SLURM_", **daemons) | openmpi(rank, per_node=2)


def hydra(rank: int) -> dict[str, str]:
    """mpiexec.hydra of MPICH 4 and 5 on one host, as it sets them."""
    return texts(PMI_RANK=rank, PMI_SIZE=4, MPI_LOCALRANKID=rank, MPI_LOCALNRANKS=4, PMI_FD=9)


def torch(rank: int) -> dict[str, str]:
    return texts(RANK=rank, WORLD_SIZE=4, LOCAL_RANK=rank % 2, MASTER_PORT=29500, MASTER_ADDR="head")


def torchrun(rank: int) -> dict[str, str]:
    return torch(rank) | texts(LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID="none")


def deepspeed(rank: int) -> dict[str, str]:
    return torch(rank) | texts(LOCAL_SIZE=2, CROSS_RANK=rank // 2, CROSS_SIZE=2)


def conclusion(environ: dict[str, str]) -> Ranks | str:
    try:
        return discover_ranks(environ)
    except LaunchError as error:
        assert str(error), "an error must say something"
        return "error"


@pytest.mark.parametrize(
    "launcher",
    [srun, pmix, pmi2, openmpi, openmpi_in_a_job, hydra, torchrun, deepspeed],
    ids=lambda launcher: launcher.__name__,
)
def test_no_missing_variable_leaves_ranks_waiting(launcher):
    complete = [discover_ranks(launcher(rank)) for rank in range(4)]
    assert [found.rank for found in complete] == [0, 1, 2, 3]
    assert {found.world_size for found in complete} == {4}
    for missing in launcher(0):
        found = [conclusion({k: v for k, v in launcher(rank).items() if k != missing}) for rank in range(4)]
        ranks = [place for place in found if isinstance(place, Ranks)]
        if not ranks:
            continue
        assert len(ranks) == 4, f"without {missing} some ranks would wait for those that stop: {found}"
        if {place.world_size for place in ranks} == {1}:
            continue  # each trains alone, and says so
        assert sorted(place.rank for place in ranks) == [0, 1, 2, 3], f"without {missing}"
        meetings = {(place.world_size, place.master_address, place.master_port) for place in ranks}
        assert len(meetings) == 1, f"without {missing} the ranks would not meet: {meetings}"
