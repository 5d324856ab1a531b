"""What a batch script runs on its first node: start the ranks, pass the end's announcement on, and start again.

Needs nothing beyond the standard library, so that it runs on a node whose real environment is inside a container. These
variables change what it does; all are optional:

    MOR_CONTAINER   image the ranks run in: *.sif with apptainer, *.sqsh or a registry name with enroot (pyxis); it
                    sees this project and the folder of the submission, and what APPTAINER_BIND or enroot's own
                    configuration adds
    MOR_LAUNCHER    `srun` (default: Slurm starts every rank) or `deepspeed` (Slurm starts one launcher a node)
    MOR_HEALTH      `check` looks at every node before training, `exclude` also requeues without the bad ones
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from data_prep.files import write_text
from data_prep.plain_text import plain
from pretrain.cluster.health import check_nodes
from pretrain.cluster.restarts import note_start, trained
from pretrain.cluster.slurm_job import PROJECT, Job, said, say
from pretrain.cluster.tasks import TASKS, run_task
from pretrain.errors import LaunchError, UserError
from pretrain.ranks.environment import clean_environment, free_port, reachable_address, rendezvous_port
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FAILED, EXIT_FINISHED, EXIT_HELD, EXIT_NO_PROGRESS, EXIT_USER

_NEVER_AGAIN = (EXIT_FINISHED, EXIT_USER, EXIT_HELD, EXIT_NO_PROGRESS)


def train(job: Job, arguments: list[str]) -> int:
    """Train a recipe on all of the job's nodes, again and again until it is finished; returns the exit code."""
    try:
        run, finished = locate(job, arguments)
        if finished:
            say(f"{run} is finished.")
            code = EXIT_FINISHED
        elif problem := _one_start_too_many(job, run):
            say(problem)
            code = EXIT_NO_PROGRESS
        elif bad := _bad_nodes(job):
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
    return job.start_again(code, f"to continue {run}")


def _one_start_too_many(job: Job, run: Path) -> str | None:
    # Beside the run folder, because a crash may come before there is one.
    file = run.parent / f".{run.name}.restarts.json"
    cause = "first start" if job.restarts == 0 and not job.array else f"restart {job.restarts}"
    return note_start(file, str(run), trained(run), job.array or job.identity, cause, say)


def _bad_nodes(job: Job) -> dict[str, str]:
    if job.environ.get("MOR_HEALTH") not in ("check", "exclude"):
        return {}
    return check_nodes(job)


def _start_ranks(job: Job, run: Path, arguments: list[str]) -> int:
    """Train until the ranks end; returns what they ended with."""
    words = run.parent / f".{run.name}.exit-code"
    read_words(words)  # what an earlier job has left
    os.environ["MOR_EXIT_CODE_FILE"] = str(words)
    os.environ["MASTER_PORT"] = str(choose_port(job.environ))
    if job.environ.get("MOR_LAUNCHER", "srun") == "deepspeed":
        code = _deepspeed_step(job, run, arguments)
    else:
        code = job.step(job.inside([job.python, "-u", "-m", "pretrain.cluster.rank", "--config", *arguments]))
    return outcome(read_words(words), code)


def outcome(words: Mapping[int, int], code: int) -> int:
    """What a start ended with, from what the ranks say (exit codes by rank) and from srun's code.

    srun's code alone misleads: it is 143 where srun itself has ended the other ranks, and can be 0 after a node has
    failed. So the run is finished when rank 0 says so, and a message for a person from any rank stops it.
    """
    if words.get(0) == EXIT_FINISHED:
        return EXIT_FINISHED
    if EXIT_USER in words.values():
        return EXIT_USER
    return words.get(0) or code or EXIT_FAILED


def read_words(prefix: Path) -> dict[int, int]:
    """Exit codes by rank, as `pretrain.cluster.rank` has left them in PREFIX.<rank>; the files are removed."""
    words = {}
    for file in prefix.parent.glob(f"{glob.escape(prefix.name)}.*"):
        with contextlib.suppress(OSError, ValueError):  # an empty one, from a full disk, says nothing
            words[int(file.name.rpartition(".")[2])] = int(file.read_text(encoding="utf-8"))
        file.unlink(missing_ok=True)
    return words


def choose_port(environ: Mapping[str, str]) -> int:
    """A port of this host, where rank 0 will be, for the ranks to meet at: MASTER_PORT, or the job's own, or another
    one when that is taken.

    Raises:
        LaunchError: MASTER_PORT is no port, or is taken.
    """
    given = environ.get("MASTER_PORT")
    if given is None:
        own = rendezvous_port(environ)
        return own if own is not None and _is_free(own) else free_port()
    if not (given.isascii() and given.isdecimal() and len(given) < 6 and 0 < int(given) < 65536):
        raise LaunchError(f"MASTER_PORT={plain(given)} is not a port; unset it, and the job chooses one.")
    if not _is_free(int(given)):
        raise LaunchError(
            f"MASTER_PORT={given} is taken on {socket.gethostname()}; unset it, and the job chooses one that is free."
        )
    return int(given)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As torch does: a connection of yesterday that is still being closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def locate(job: Job, arguments: list[str]) -> tuple[Path, bool]:
    """The run folder of a recipe, read where its packages are installed, and whether the run is finished.

    Raises:
        LaunchError: when the recipe cannot be used; the reason has been printed.
    """
    command = job.inside([job.python, "-m", "pretrain.cluster.locate", *arguments])
    options = job.container_options()
    if options:
        command = ["srun", "--nodes=1", "--ntasks=1", *options, *command]
    environ = clean_environment() if not options else None
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**(environ or os.environ), "PYTHONPATH": paths}
    )
    if done.returncode:
        raise LaunchError("the recipe cannot be used; nothing was started.")
    found = said(done.stdout, command, "run", "finished")
    return Path(found["run"]), found["finished"] is True


def _leave_bad_nodes(job: Job, bad: dict[str, str]) -> int:
    for host, reason in bad.items():
        say(f"node {host} is not sound: {reason}")
    if job.environ["MOR_HEALTH"] != "exclude" or len(bad) == len(job.hosts):
        return EXIT_FAILED
    if not job.can_spare(list(bad)):
        say(f"the partition has fewer than {len(job.hosts)} other nodes; not requeueing.")
        return EXIT_FAILED
    # Said first: with the requeue Slurm begins to end this script.
    say(f"requeueing without {', '.join(bad)}.")
    if not job.requeue(without=list(bad)):
        return EXIT_FAILED
    time.sleep(120)
    return EXIT_AGAIN


def _deepspeed_step(job: Job, run: Path, arguments: list[str]) -> int:
    """One DeepSpeed launcher on each node, told by a hostfile of the job's nodes how many ranks there are."""
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
