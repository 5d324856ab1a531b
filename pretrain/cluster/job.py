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

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from data_prep.files import write_text
from data_prep.plain_text import plain
from pretrain.cluster.restarts import note_start
from pretrain.environment import clean_environment, reachable_address, rendezvous_port
from pretrain.errors import LaunchError, UserError
from pretrain.hostlist import expand_hostlist
from pretrain.signals import EXIT_AGAIN, EXIT_FAILED, EXIT_FINISHED, EXIT_HELD, EXIT_NO_PROGRESS, EXIT_USER

_ROOT = Path(__file__).resolve().parent.parent.parent
_NEVER_AGAIN = (EXIT_FINISHED, EXIT_USER, EXIT_HELD, EXIT_NO_PROGRESS)


class Job:
    """The Slurm job this process is the batch script of."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises LaunchError outside a Slurm job."""
        if "SLURM_JOB_ID" not in environ:
            raise LaunchError("This runs inside a Slurm job: sbatch slurm/train.sbatch RECIPE, or mor submit RECIPE.")
        self.environ = environ
        self.identity = environ["SLURM_JOB_ID"]
        self.array = environ.get("SLURM_ARRAY_JOB_ID")
        self.restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.hosts = expand_hostlist(environ["SLURM_JOB_NODELIST"])
        self.python = "python" if environ.get("MOR_CONTAINER") else sys.executable
        self.announced: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        # What ends the child politely: ranks take USR1 as often as it comes, any other command a Ctrl-C.
        self._polite = signal.SIGUSR1
        self._through_srun = False
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    @property
    def cores(self) -> int:
        """Processors of this node that belong to the job."""
        return int(self.environ.get("SLURM_CPUS_ON_NODE", "1"))

    @property
    def tasks(self) -> int:
        """Tasks the job was asked to have; 1 where nobody said."""
        return int(self.environ.get("SLURM_NTASKS", "1"))

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
        """Cancel the elements that wait behind this one."""
        subprocess.run(["scancel", "--state=PENDING", str(self.array)], capture_output=True)

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
        return int(self.environ.get("SLURM_GPUS_ON_NODE") or 1)

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
            return self._child.wait()
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
    run = locate(job, arguments)
    if _state(run) == "finished":
        say(f"{run} is finished.")
        return _finish(job)
    cause = "first start" if job.restarts == 0 and not job.array else f"restart {job.restarts}"
    if problem := note_start(run, job.array or job.identity, cause):
        say(problem)
        if job.array:
            job.cancel_rest_of_array()
        return EXIT_NO_PROGRESS
    if job.environ.get("MOR_HEALTH") in ("check", "exclude"):
        from pretrain.cluster.health import check_nodes

        bad = check_nodes(job)
        if bad:
            return _leave_bad_nodes(job, bad)
    polite = run.parent / f".{run.name}.exit-code"
    polite.unlink(missing_ok=True)
    os.environ["MOR_EXIT_CODE_FILE"] = str(polite)
    if job.environ.get("MOR_LAUNCHER", "srun") == "deepspeed":
        code = _deepspeed_step(job, run, arguments)
    else:
        code = job.step(job.inside([job.python, "-u", "-m", "pretrain.cluster.rank", "--config", *arguments]))
    # After a node has failed srun may return 0; only the run itself knows that it is finished.
    if _state(run) == "finished":
        return _finish(job)
    if polite.is_file():
        code = int(polite.read_text(encoding="utf-8"))
        polite.unlink()
    return _again(job, run, code or EXIT_FAILED)


def locate(job: Job, arguments: list[str]) -> Path:
    """The run folder of a recipe, read where its packages are installed.

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
    return Path(done.stdout.strip().splitlines()[-1])


def say(text: str) -> None:
    """A line for the job's log."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} job {os.environ.get('SLURM_JOB_ID')}: {plain(text, lines=True)}", flush=True)


def _finish(job: Job) -> int:
    if job.array:
        job.cancel_rest_of_array()
    return EXIT_FINISHED


def _again(job: Job, run: Path, code: int) -> int:
    """Go on after an announced end or a crash; at the next start `note_start` decides whether that was wise."""
    if code in _NEVER_AGAIN or job.is_ending():
        return code
    if job.array:
        say(f"{job.why(code)}; the next element of array {job.array} continues {run}.")
        return EXIT_FINISHED if code == EXIT_AGAIN else code
    return job.start_again(code, f"to continue {run}")


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


def _state(run: Path) -> str:
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError):
        return "absent"


def _deepspeed_step(job: Job, run: Path, arguments: list[str]) -> int:
    """One DeepSpeed launcher on each node, told by a hostfile of the job's nodes how many ranks there are."""
    slots = job.environ.get("SLURM_NTASKS_PER_NODE") or job.environ.get("SLURM_GPUS_ON_NODE") or "1"
    hostfile = run.parent / f".{run.name}.hostfile"
    write_text(hostfile, "".join(f"{host} slots={slots}\n" for host in job.hosts))
    options = {
        "hostfile": hostfile,
        "master_addr": os.environ.get("MASTER_ADDR") or reachable_address(job.hosts[0]),
        "master_port": rendezvous_port(job.environ),
    }
    launcher = [job.python, "-m", "deepspeed.launcher.runner", "--no_ssh", "--force_multi", "--no_local_rank"]
    launcher += [f"--{name}={value}" for name, value in options.items()]
    program = ["--module", "pretrain.cluster.rank", "--config", *arguments]
    # Only the node itself knows its number.
    command = f"exec {shlex.join(launcher)} --node_rank=$SLURM_NODEID {shlex.join(program)}"
    return job.step(job.inside(["bash", "-c", command]), per_node=1)


def main(arguments: list[str]) -> int:
    """`python -m pretrain.cluster.job KIND ...`, as the scripts of slurm/ call it; returns the exit code."""
    from pretrain.cluster.tasks import compare, evaluate, prep, prepare, report

    kinds = {
        "train": train,
        "prep": prep,
        "eval": evaluate,
        "compare": compare,
        "prepare": prepare,
        "report": report,
    }
    try:
        if len(arguments) < 2 or arguments[0] not in kinds:
            raise LaunchError(
                "the file to work on is missing; the first lines of the sbatch script say how to call it."
            )
        return kinds[arguments[0]](Job(), arguments[1:])
    except UserError as error:
        print(f"slurm job: {plain(error, lines=True)}", file=sys.stderr, flush=True)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
