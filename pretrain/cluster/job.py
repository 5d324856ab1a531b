"""What a batch script runs on its first node: start the ranks, pass the announcement of the end on, and start again.

Uses the standard library and small modules of this project only, so that it runs on a node whose Python environment is
inside a container. The first lines of slurm/train.sbatch describe the variables that change what it does.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from data_prep.files import write_text
from data_prep.plain_text import plain
from pretrain.cluster.health import check_nodes
from pretrain.cluster.restarts import note_start, trained
from pretrain.cluster.slurm_job import Job, say
from pretrain.cluster.tasks import TASKS, run_task
from pretrain.errors import LaunchError, UserError
from pretrain.ranks.environment import free_port, reachable_address, rendezvous_port
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FAILED, EXIT_FINISHED, EXIT_HELD, EXIT_NO_PROGRESS, EXIT_USER

_NEVER_AGAIN = (EXIT_FINISHED, EXIT_USER, EXIT_HELD, EXIT_NO_PROGRESS)


def train(job: Job, arguments: list[str]) -> int:
    """Train a recipe on all of the job's nodes, again and again until it is finished; returns the exit code."""
    try:
        found = job.ask("pretrain.cluster.locate", arguments, "run", "finished")
        run = Path(found["run"])
        # Beside the run folder, because a crash may come before there is one.
        starts = run.parent / f".{run.name}.restarts.json"
        if found["finished"] is True:
            say(f"{run} is finished.")
            code = EXIT_FINISHED
        elif problem := note_start(starts, str(run), trained(run), job.array or job.identity, say):
            say(problem)
            code = EXIT_NO_PROGRESS
        elif job.environ.get("MOR_HEALTH") in ("check", "exclude") and (bad := check_nodes(job)):
            return _leave_bad_nodes(job, bad)
        else:
            code = _start_ranks(job, run, arguments)
    except UserError:
        job.cancel_rest_of_array()
        raise
    if code in _NEVER_AGAIN:
        job.cancel_rest_of_array()
        return code
    if job.is_ending():
        return code
    if job.array:
        say(f"{job.why(code)}; the next element of array {job.array} continues {run}.")
        return EXIT_FINISHED if code == EXIT_AGAIN else code
    return job.start_again(job.why(code), code)


def _start_ranks(job: Job, run: Path, arguments: list[str]) -> int:
    """Train until the ranks end; returns what they ended with."""
    codes = run.parent / f".{run.name}.exit-code"
    read_codes(codes)  # what an earlier job has left
    os.environ["MOR_EXIT_CODE_FILE"] = str(codes)
    os.environ.setdefault("MASTER_PORT", str(choose_port(job.environ)))
    if job.environ.get("MOR_LAUNCHER", "srun") == "deepspeed":
        code = _deepspeed_step(job, run, arguments)
    else:
        code = job.step(job.inside([job.python, "-u", "-m", "pretrain.cluster.rank", "--config", *arguments]))
    return outcome(read_codes(codes), code)


def outcome(codes: Mapping[int, int], code: int) -> int:
    """What a start ended with, from the ranks' exit codes and from srun's code.

    srun's code alone misleads: it is 143 where srun itself has ended the other ranks, and can be 0 after a node has
    failed. So the run is finished when rank 0 says so, and a message for a person from any rank stops it.
    """
    if codes.get(0) == EXIT_FINISHED:
        return EXIT_FINISHED
    if EXIT_USER in codes.values():
        return EXIT_USER
    return codes.get(0) or code or EXIT_FAILED


def read_codes(prefix: Path) -> dict[int, int]:
    """Exit codes by rank, as `pretrain.cluster.rank` has left them in PREFIX.<rank>; the files are removed."""
    codes = {}
    for file in prefix.parent.glob(f"{glob.escape(prefix.name)}.*"):
        with contextlib.suppress(OSError, ValueError):  # a full disk leaves an empty file
            codes[int(file.name.rpartition(".")[2])] = int(file.read_text(encoding="utf-8"))
        file.unlink(missing_ok=True)
    return codes


def choose_port(environ: Mapping[str, str]) -> int:
    """A free port of this host, on which rank 0 will listen: the one derived from the job's number if possible."""
    port = rendezvous_port(environ)
    with socket.socket() as probe, contextlib.suppress(OSError):
        # As torch does: a connection that is still being closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port is not None:
            probe.bind(("", port))
            return port
    return free_port()


def _leave_bad_nodes(job: Job, bad: dict[str, str]) -> int:
    for host, reason in bad.items():
        say(f"node {host} is not fit: {reason}")
    if job.environ["MOR_HEALTH"] != "exclude" or len(bad) == len(job.hosts):
        return EXIT_FAILED
    if not job.can_spare(list(bad)):
        say(f"the partition has fewer than {len(job.hosts)} other nodes; not requeueing.")
        return EXIT_FAILED
    return job.start_again(f"excluding {', '.join(bad)}", EXIT_FAILED, without=list(bad))


def _deepspeed_step(job: Job, run: Path, arguments: list[str]) -> int:
    """One DeepSpeed launcher on each node; a hostfile tells it the job's nodes and how many ranks each has."""
    slots = job.environ.get("SLURM_NTASKS_PER_NODE") or job.environ.get("SLURM_GPUS_ON_NODE") or "1"
    hostfile = run.parent / f".{run.name}.hostfile"
    write_text(hostfile, "".join(f"{host} slots={slots}\n" for host in job.hosts))
    options = {
        "hostfile": hostfile,
        "master_addr": os.environ.get("MASTER_ADDR") or reachable_address(job.hosts[0]),
        "master_port": os.environ["MASTER_PORT"],
    }
    launcher = [job.python, "-m", "deepspeed.launcher.runner", "--no_ssh", "--force_multi", "--no_local_rank"]
    launcher += [f"--{name}={value}" for name, value in options.items()]
    program = ["--module", "pretrain.cluster.rank", "--config", *arguments]
    # Only the node itself knows its number.
    command = f"exec {shlex.join(launcher)} --node_rank=$SLURM_NODEID {shlex.join(program)}"
    return job.step(job.inside(["bash", "-c", command]), per_node=1)


def main(arguments: list[str]) -> int:
    """`python -m pretrain.cluster.job KIND ...`, as the scripts of slurm/ call it; returns the exit code."""
    try:
        if len(arguments) < 2 or arguments[0] not in ("train", *TASKS):
            raise LaunchError(
                "the file to work on is missing; the first lines of the sbatch script say how to call it."
            )
        kind, *rest = arguments
        return train(Job(), rest) if kind == "train" else run_task(Job(), kind, rest)
    except UserError as error:
        print(f"slurm job: {plain(error, lines=True)}", file=sys.stderr, flush=True)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
