"""Whatever single variable a launcher's environment lacks, all ranks come to one conclusion: none waits for ever."""

from __future__ import annotations

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks.environment import Ranks, discover_ranks


def srun(rank: int) -> dict[str, str]:
    """Two nodes of two tasks."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_JOB_NODELIST": "localhost,ip6-localhost",
        "SLURM_STEP_NODELIST": "localhost,ip6-localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_NODEID": str(rank // 2),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_PROCID": str(rank),
    }


def pmix(rank: int) -> dict[str, str]:
    """srun --mpi=pmix, as Slurm 22.05 sets it."""
    return {**srun(rank), "PMIX_RANK": str(rank), "PMIX_NAMESPACE": "slurm.pmix.4711.0", "PMIX_HOSTNAME": "localhost"}


def pmi2(rank: int) -> dict[str, str]:
    """srun --mpi=pmi2."""
    return {**srun(rank), "PMI_RANK": str(rank), "PMI_SIZE": "4", "PMI_JOBID": "4711.0"}


def openmpi(rank: int) -> dict[str, str]:
    """mpirun of Open MPI 5 on one host."""
    place = {"RANK": rank, "SIZE": 4, "LOCAL_RANK": rank, "LOCAL_SIZE": 4}
    variables = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in place.items()}
    return {**variables, "PMIX_NAMESPACE": "prterun-host-77@1", "PMIX_RANK": str(rank)}


def openmpi_in_a_job(rank: int) -> dict[str, str]:
    """mpirun of Open MPI in a Slurm job of two nodes: its daemons are srun's tasks."""
    place = {"RANK": rank, "SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_SIZE": 2}
    variables = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in place.items()}
    daemon = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    daemon |= {"SLURM_PROCID": str(rank // 2), "SLURM_LOCALID": "0"}
    return {**srun(rank), **daemon, **variables, "PMIX_NAMESPACE": "prterun-host-77@1", "PMIX_RANK": str(rank)}


def hydra(rank: int) -> dict[str, str]:
    """mpiexec.hydra of MPICH 4 and 5 on one host, as it sets them."""
    place = {"PMI_RANK": rank, "PMI_SIZE": 4, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 4, "PMI_FD": 9}
    return {name: str(value) for name, value in place.items()}


def torchrun(rank: int) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    variables = {name: str(value) for name, value in place.items()}
    return {**variables, "MASTER_ADDR": "head", "TORCHELASTIC_RUN_ID": "none"}


def deepspeed(rank: int) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_SIZE": 2, "MASTER_PORT": 29500}
    variables = {name: str(value) for name, value in {**place, "CROSS_RANK": rank // 2, "CROSS_SIZE": 2}.items()}
    return {**variables, "MASTER_ADDR": "head"}


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


@pytest.mark.parametrize("launcher", [srun, pmix, pmi2], ids=lambda launcher: launcher.__name__)
def test_in_a_job_the_port_is_the_jobs(launcher):
    ports = {discover_ranks({**launcher(rank), "SLURM_JOB_ID": job}).master_port for rank in range(4) for job in "123"}
    assert len(ports) == 3 and all(1024 < port < 32768 for port in ports)
