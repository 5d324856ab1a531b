"""Launch variables that were changed: ranks that fit together, or one sentence."""

from __future__ import annotations

import random

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks import environment
from pretrain.ranks.environment import Ranks, clean_environment, discover_ranks
from pretrain.ranks.signals import StopRequest
from tests.fuzz.support import ODD_TEXTS, counts, drive, mutate_text
from tests.pretrain.ranks.test_environment import DEEPSPEED, HYDRA, OPENMPI, SRUN, TORCH, TORCHRUN

MVAPICH = dict.fromkeys(("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"), "1")
MVAPICH |= dict.fromkeys(("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"), "2")
LAUNCHED = [{}, SRUN, OPENMPI, HYDRA, MVAPICH, TORCH, TORCHRUN, DEEPSPEED, {**SRUN, **TORCHRUN}, {**SRUN, **OPENMPI}]
ODD_NUMBERS = ["", "-1", "0", "1", "7", "4294967295", "9" * 5000, "1_0", "+1", " 1", "1e3", "0x1", "nan"]
ODD_NUMBERS += ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}", "\udcff"]
NAMES = [*TORCH, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MOR_RANKS"]
NAMES += ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_JOB_END_TIME"]


def make(source: random.Random) -> dict[str, str]:
    environ = dict(source.choice(LAUNCHED))
    for _ in range(source.choice([1, 1, 2, 4])):
        name = source.choice([*environ, *NAMES])
        match source.randrange(5):
            case 0:
                environ.pop(name, None)
            case 1:
                environ[name] = source.choice(ODD_NUMBERS)
            case 2:
                environ[name] = source.choice(ODD_TEXTS)
            case 3:
                environ[name] = mutate_text(environ.get(name, "1"), source)
            case 4:
                environ[name] = str(source.randrange(10))
    return environ


def do_not_fit(environ: dict[str, str], ranks: Ranks) -> str | None:
    fit = 0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size
    if not fit or not 0 < ranks.master_port < 65536 or ranks.device not in (0, ranks.local_rank):
        return f"{ranks}"
    if not ranks.master_address.isprintable() or not ranks.master_address:
        return f"the address became {ranks.master_address!r}"
    return None


@counts
def test_launch_variables(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without looking host names up, which is the network's business."""

    def reachable(host: str) -> str:
        if host != "localhost":
            raise LaunchError(f"{host} does not resolve")
        return host

    monkeypatch.setattr(environment, "reachable_address", reachable)
    monkeypatch.setattr(environment, "_agree_through_mpi", lambda rank, size, port: ("localhost", port or 2900))
    drive(count, make, discover_ranks, changed=do_not_fit, used=0.05, refused=0.05)
    drive(count, make, clean_environment)
    drive(count, make, lambda environ: StopRequest(environ=environ))
