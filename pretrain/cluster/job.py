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
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep.errors import DataError
from data_prep.files import write_text
from data_prep.json_input import parse_json
from data_prep.plain_text import plain
from pretrain.cluster.restarts import note_start, trained
from pretrain.errors import LaunchError, UserError
from pretrain.ranks.environment import clean_environment, free_port, reachable_address, read_integer, rendezvous_port
from pretrain.ranks.hostlist import expand_hostlist
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FAILED, EXIT_FINISHED, EXIT_HELD, EXIT_NO_PROGRESS, EXIT_USER

_ROOT = Path(__file__).resolve().parent.parent.parent
_NEVER_AGAIN = (EXIT_FINISHED, EXIT_USER, EXIT_HELD, EXIT_NO_PROGRESS)


class Job:
    """The Slurm job this process is the batch script of."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises LaunchError outside a Slurm job, or when a number that Slurm tells it is not one."""
        if "SLURM_JOB_ID" not in environ:
            raise LaunchError("This runs inside a Slurm job: sbatch slurm/train.sbatch RECIPE, or mor submit RECIPE.")
        self.environ = environ
        self.identity = environ["SLURM_JOB_ID"]
        self.array = environ.get("SLURM_ARRAY_JOB_ID")
        self.restarts = self.number("SLURM_RESTART_COUNT", "0")
        self.hosts = expand_hostlist(environ["SLURM_JOB_NODELIST"])
        self.python = "python" if environ.get("MOR_CONTAINER") else sys.executable
        self.announced: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        # What ends the child politely: ranks take USR1 as often as it comes, any other command a Ctrl-C.
        self._polite = signal.SIGUSR1
        self._through_srun = False
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def number(self, name: str, default: str) -> int:
        """One of the numbers that Slurm tells the job."""
        return read_integer(name, self.environ.get(name) or default)

    @property
    def cores(self) -> int:
        """Processors of this node that belong to the job."""
        return self.number("SLURM_CPUS_ON_NODE", "1")

    @property
    def tasks(self) -> int:
        """Tasks the job was asked to have; 1 where nobody said."""
        return self.number("SLURM_NTASKS", "1")

    def environment_for_sbatch(self) -> dict[str, str]:
        """This job's variables without what describes this job, for a job that it submits."""
        kept = ("SLURM_CONF",)
        described = ("SLURM", "SBATCH")
        return {name: value for name, value in self.environ.items() if name in kept or not name.startswith(described)}

    def step(self, command: list[str], *, per_node: int | None = None, options: list[str] | None = None) -> int:
        """Run `command` as a job step on all nodes and return its exit code.

        `per_node` is the number of tasks on each node; by default as many as the job asked for, otherwise one for each
        GPU of a node. `options` are further ones of srun, which go before those chosen here.
        """
        chosen = per_node or self._tasks_per_node()
        own = ["--kill-on-bad-exit=1", *([f"--ntasks-per-node={chosen}"] if chosen else [])]
        if per_node:
            own.append(f"--ntasks={per_node * len(self.hosts)}")
        tasks = chosen or -(-self.tasks // len(self.hosts))
        # Since Slurm 22.05 srun no longer takes over what sbatch was told.
        own.append("--overcommit" if tasks > self.cores else f"--cpus-per-task={self.cores // tasks}")
        return self._wait(["srun", *own, *(options or []), *self.container_options(), *command], signal.SIGUSR1)

    def alone(self, command: list[str]) -> int:
        """Run `command` once, on this node, and return its exit code."""
        if self.container_options():
            command = ["srun", "--nodes=1", "--ntasks=1", *self.container_options(), *command]
        return self._wait(self.inside(command), signal.SIGINT)

    def inside(self, command: list[str]) -> list[str]:
        """`command` as it runs in the image of MOR_CONTAINER where that is not srun's own business."""
        image = self.environ.get("MOR_CONTAINER", "")
        if not image.endswith(".sif"):
            return command
        return ["apptainer", "exec", "--nv", "--bind", f"{_ROOT},{Path.cwd()}", image, *command]

    def why(self, code: int) -> str:
        """Why the command ended early, for the log."""
        return f"{self.announced.name} announced the end" if self.announced else f"it ended with code {code}"

    def start_again(self, code: int, purpose: str) -> int:
        """Requeue this job and wait to be ended by that; returns the exit code where it is not allowed."""
        say(f"{self.why(code)}; requeueing {purpose}.")
        if not self.requeue():
            say("Requeueing is not allowed here; for training, a chain does the same: sbatch --array=1-10%1 ...")
            return code
        # Slurm ends this script; returning first would count as the job's own end.
        time.sleep(120)
        return EXIT_AGAIN

    def requeue(self, without: Sequence[str] = ()) -> bool:
        """Ask Slurm to start this job again, elsewhere than on the nodes `without`; False where that is not allowed."""
        commands = [["scontrol", "requeue", self.identity]]
        if without:
            # Only a pending job's nodes can be chosen, so this comes second; nodes left out before stay out.
            left_out = ",".join(sorted({*self._excluded(), *without}))
            commands.append(["scontrol", "update", f"JobId={self.identity}", f"ExcNodeList={left_out}"])
        # Requeueing ends every process of the job, the second command's too; it has a moment's grace.
        script = " && ".join(["trap '' TERM", *map(shlex.join, commands)])
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        if done.returncode:
            say(f"scontrol: {(done.stderr or done.stdout).strip()}")
        return done.returncode == 0

    def can_spare(self, hosts: Sequence[str]) -> bool:
        """Whether the partition has nodes enough for this job without these and those left out already."""
        partition = self.environ.get("SLURM_JOB_PARTITION", "")
        command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]
        shown = subprocess.run(command, capture_output=True, text=True)
        return len(set(shown.stdout.split()) - {*hosts, *self._excluded()}) >= len(self.hosts)

    def is_ending(self) -> bool:
        """Whether Slurm is already ending this job: cancelled, out of time, or requeued by Slurm itself."""
        shown = self._shown()
        return bool(shown) and "JobState=RUNNING" not in shown

    def cancel_rest_of_array(self) -> None:
        """Cancel the elements of a chain that wait behind this one; nothing outside an array."""
        if self.array:
            subprocess.run(["scancel", "--state=PENDING", self.array], capture_output=True)

    def _shown(self) -> list[str]:
        """This job's record as Slurm shows it, in words NAME=VALUE; empty where Slurm does not answer."""
        shown = subprocess.run(["scontrol", "--oneliner", "show", "job", self.identity], capture_output=True, text=True)
        return shown.stdout.split() if shown.returncode == 0 else []

    def _excluded(self) -> list[str]:
        names = next((word.partition("=")[2] for word in self._shown() if word.startswith("ExcNodeList=")), "")
        return expand_hostlist(names) if names not in ("", "(null)") else []

    def _tasks_per_node(self) -> int | None:
        if "SLURM_NTASKS_PER_NODE" in self.environ or "SLURM_NTASKS" in self.environ:
            return None
        return self.number("SLURM_GPUS_ON_NODE", "1")

    def container_options(self) -> list[str]:
        image = self.environ.get("MOR_CONTAINER", "")
        if not image or image.endswith(".sif"):
            return []
        mounts = ",".join(f"{folder}:{folder}" for folder in {_ROOT, Path.cwd()})
        return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]

    def _wait(self, command: list[str], polite: signal.Signals) -> int:
        self._polite, self._through_srun = polite, command[0] == "srun"
        self._child = subprocess.Popen(command)
        try:
            if self.announced:
                self._end_politely()
            code = self._child.wait()
            return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it
        finally:
            self._child = None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.announced = signal.Signals(number)
        self._end_politely()

    def _end_politely(self) -> None:
        if self._child is None:
            return
        if self._polite is signal.SIGINT and self._through_srun:
            # srun keeps a Ctrl-C to itself; this reaches the step's processes, and not this script.
            subprocess.run(["scancel", "--signal=INT", self.identity], capture_output=True)
        else:
            self._child.send_signal(self._polite)


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
    from pretrain.cluster.health import check_nodes

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
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**(environ or os.environ), "PYTHONPATH": paths}
    )
    if done.returncode:
        raise LaunchError("the recipe cannot be used; nothing was started.")
    found = said(done.stdout, command, "run", "finished")
    return Path(found["run"]), found["finished"] is True


def said(printed: str, command: Sequence[str], *keys: str) -> dict[str, Any]:
    """The JSON object with `keys` in the last line that `command` has printed.

    Raises:
        LaunchError: there is none.
    """
    with contextlib.suppress(LookupError, DataError):
        found = parse_json(printed.strip().splitlines()[-1], "the last line")
        if isinstance(found, dict) and found.keys() >= set(keys):
            return found
    raise LaunchError(
        f"`{shlex.join(command)}` did not answer as expected; run it by hand to see why. Nothing was started."
    )


def say(text: str) -> None:
    """A line for the job's log."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} job {os.environ.get('SLURM_JOB_ID')}: {plain(text, lines=True)}", flush=True)


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
    from pretrain.cluster.tasks import TASKS, run_task

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
