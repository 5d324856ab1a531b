"""The Slurm job that this process is the batch script of: its steps, its end, its log."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep.errors import DataError
from data_prep.json_input import parse_json
from data_prep.plain_text import plain
from pretrain.errors import LaunchError
from pretrain.ranks.environment import clean_environment, read_integer
from pretrain.ranks.hostlist import expand_hostlist
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_USER

PROJECT = Path(__file__).resolve().parents[2]
_LONGEST_END = 120.0  # seconds


class Job:
    """The Slurm job that this process is the batch script of.

    Raises:
        LaunchError: outside a Slurm job, or when a variable of Slurm's is not a number.
    """

    def __init__(self) -> None:
        environ = os.environ
        if "SLURM_JOB_ID" not in environ:
            raise LaunchError("This runs inside a Slurm job: sbatch slurm/train.sbatch RECIPE, or mor submit RECIPE.")
        self.environ = environ
        self.identity = environ["SLURM_JOB_ID"]
        self.array = environ.get("SLURM_ARRAY_JOB_ID")
        self.restarts = self.number("SLURM_RESTART_COUNT", "0")
        self.cores = self.number("SLURM_CPUS_ON_NODE", "1")  # of this node
        self.tasks = self.number("SLURM_NTASKS", "1")
        self.hosts = expand_hostlist(environ["SLURM_JOB_NODELIST"])
        self.python = "python" if environ.get("MOR_CONTAINER") else sys.executable
        self.announced: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        # What asks the child to stop: USR1 for ranks, which may get it several times, Ctrl-C for other commands.
        self._polite = signal.SIGUSR1
        self._through_srun = False
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def number(self, name: str, default: str) -> int:
        """A whole number from one of Slurm's variables."""
        return read_integer(name, self.environ.get(name) or default)

    def step(self, command: list[str], *, per_node: int | None = None, options: list[str] | None = None) -> int:
        """Run `command` as a job step on all nodes and return its exit code.

        Args:
            per_node: tasks on each node; by default as many as the job asked for, otherwise one for each GPU of a node.
            options: further options of srun, which override those chosen here.
        """
        chosen = per_node
        if not chosen and not {"SLURM_NTASKS_PER_NODE", "SLURM_NTASKS"} & self.environ.keys():
            chosen = self.number("SLURM_GPUS_ON_NODE", "1")
        own = ["--kill-on-bad-exit=1", *([f"--ntasks-per-node={chosen}"] if chosen else [])]
        if per_node:
            own.append(f"--ntasks={per_node * len(self.hosts)}")
        tasks = chosen or -(-self.tasks // len(self.hosts))
        # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
        own.append("--overcommit" if tasks > self.cores else f"--cpus-per-task={self.cores // tasks}")
        return self._wait(["srun", *own, *(options or []), *self._container_options(), *command], signal.SIGUSR1)

    def alone(self, command: list[str]) -> int:
        """Run `command` once, on this node, and return its exit code."""
        return self._wait(self._once(command), signal.SIGINT)

    def ask(self, module: str, arguments: Sequence[str], *keys: str) -> dict[str, Any]:
        """The JSON object with `keys` that `python -m MODULE` prints, run where the project's packages are installed.

        Raises:
            LaunchError: it failed, or printed no such object.
        """
        command = self._once([self.python, "-m", module, *arguments])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace")
        if done.returncode == EXIT_USER:
            raise LaunchError("nothing was started; the message above says why.")
        with contextlib.suppress(LookupError, DataError):
            found = parse_json(done.stdout.strip().splitlines()[-1], "the last line")
            if done.returncode == 0 and isinstance(found, dict) and found.keys() >= set(keys):
                return found
        problem = f"ended with code {done.returncode}" if done.returncode else "did not print a result"
        raise LaunchError(f"nothing was started: `{shlex.join(command)}` {problem}; run it by hand to see why.")

    def _once(self, command: list[str]) -> list[str]:
        """`command` in the job's container, as a step of one task where srun enters the container."""
        options = self._container_options()
        return ["srun", "--nodes=1", "--ntasks=1", *options, *command] if options else self.inside(command)

    def inside(self, command: list[str]) -> list[str]:
        """`command` in the image of MOR_CONTAINER if that is apptainer's; srun itself enters the images of enroot."""
        image = self.environ.get("MOR_CONTAINER", "")
        if not image.endswith(".sif"):
            return command
        return ["apptainer", "exec", "--nv", "--bind", f"{PROJECT},{Path.cwd()}", image, *command]

    def why(self, code: int) -> str:
        """Why the command ended early, for the log."""
        return f"{self.announced.name} announced the end" if self.announced else f"it ended with code {code}"

    def start_again(self, reason: str, code: int, without: Sequence[str] = ()) -> int:
        """Requeue this job, for nodes other than `without`, and wait until Slurm ends it; returns `code` where Slurm
        does not allow it.
        """
        say(f"{reason}; requeueing.")
        commands = [["scontrol", "requeue", self.identity]]
        if without:
            # Only a pending job's nodes can be chosen, so this comes second; nodes excluded earlier stay excluded.
            excluded = ",".join(sorted({*self._excluded(), *without}))
            commands.append(["scontrol", "update", f"JobId={self.identity}", f"ExcNodeList={excluded}"])
        # Requeueing sends SIGTERM to every process of the job, the second command's included.
        script = " && ".join(["trap '' TERM", *map(shlex.join, commands)])
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        if done.returncode:
            say(f"scontrol: {(done.stderr or done.stdout).strip()}")
            say("Requeueing is not allowed here; for training, a chain does the same: sbatch --array=1-10%1 ...")
            return code
        # Ending before Slurm ends this script would count as the job's own end.
        end = time.monotonic() + _LONGEST_END
        while self.announced is not signal.SIGTERM and time.monotonic() < end:
            time.sleep(0.1)
        return EXIT_AGAIN

    def can_spare(self, hosts: Sequence[str]) -> bool:
        """Whether the partition has enough nodes for this job without `hosts` and those excluded earlier."""
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
        """This job's record in Slurm as words NAME=VALUE; empty if Slurm does not answer."""
        shown = subprocess.run(["scontrol", "--oneliner", "show", "job", self.identity], capture_output=True, text=True)
        return shown.stdout.split() if shown.returncode == 0 else []

    def _excluded(self) -> list[str]:
        names = next((word.partition("=")[2] for word in self._shown() if word.startswith("ExcNodeList=")), "")
        return expand_hostlist(names) if names not in ("", "(null)") else []

    def _container_options(self) -> list[str]:
        image = self.environ.get("MOR_CONTAINER", "")
        if not image or image.endswith(".sif"):
            return []
        mounts = ",".join(f"{folder}:{folder}" for folder in {PROJECT, Path.cwd()})
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
            # srun does not pass a Ctrl-C on; this reaches the step's processes, and not this script.
            subprocess.run(["scancel", "--signal=INT", self.identity], capture_output=True)
        else:
            self._child.send_signal(self._polite)


def environment_for_jobs() -> dict[str, str]:
    """This process's variables for jobs that it submits: without those that describe this job or its options."""
    return {name: value for name, value in clean_environment().items() if not name.startswith("SBATCH_")}


def say(text: str) -> None:
    """A line for the job's log."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} job {os.environ.get('SLURM_JOB_ID')}: {plain(text, lines=True)}", flush=True)
