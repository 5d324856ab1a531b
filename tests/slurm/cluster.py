"""A Slurm cluster of its own on this machine: controller and several node daemons, as root or as an ordinary user.

Nothing outside its folder is touched, its ports are free ones, and only processes it started are ended.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Daemons live outside an ordinary user's PATH on Debian.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
# In which `python` is the one that runs the tests.
JOB_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# Of each node, whatever this machine has.
CPUS, GPUS = 2, 2
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=0,bf_interval=2
KillWait=5
CompleteWait=0
MinJobAge=3600
SlurmdTimeout=30
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO PriorityTier=1 State=UP
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO PriorityTier=10 State=UP
PartitionName=all Nodes=ALL MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO PriorityTier=1 State=UP
"""


def script(name: str) -> str:
    return str(Path(__file__).resolve().parents[2] / "slurm" / f"{name}.sbatch")


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]


@dataclass
class Cluster:
    """A running cluster. `environ` is what a client needs."""

    folder: Path
    nodes: int
    environ: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a client command in the cluster's environment."""
        done = subprocess.run(
            command, env={**self.environ, **environ}, capture_output=True, text=True, timeout=120, cwd=self.work
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    @property
    def work(self) -> Path:
        """Where jobs are submitted from."""
        return self.folder / "work"

    def submit(self, *arguments: str, **environ: str) -> str:
        """`sbatch` with these arguments, for jobs that use this Python; the job's number."""
        environ = {"MOR_SETUP": "true", "OMP_NUM_THREADS": "1", "PATH": JOB_PATH, **environ}
        return self.run("sbatch", "--parsable", *arguments, **environ).stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """The job's record as scontrol shows it."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def interval(self, job: str) -> tuple[str, str]:
        """When a job that has ended started and ended, to the second."""
        record = self.show(job)
        return record["StartTime"], record["EndTime"]

    def wait(self, job: str) -> str:
        """Wait until the job is over and return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY")
        self.until(lambda: self.state(job) in over, f"the end of job {job}")
        return self.state(job)

    def is_empty(self) -> bool:
        """Whether no job waits or runs."""
        return not self.run("squeue", "-h", "-r", check=False).stdout.strip()

    def until(self, probe: Callable[[], object], what: str, seconds: float = 240) -> None:
        """Poll until `probe` returns something true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if probe():
                return
            time.sleep(0.2)
        raise AssertionError(f"waited {seconds} s for {what}\n{self.run('squeue', '-t', 'all').stdout}\n{self.logs()}")

    def logs(self) -> str:
        """The ends of the daemons' logs and of the jobs' output."""
        files = [*sorted((self.folder / "log").glob("*.log")), *sorted(self.work.rglob("*.out"))]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def kill_node(self, node: str, *, processes: bool) -> None:
        """Kill a node's daemon, and as a power cut would also all `processes` it has started."""
        daemon = self.daemons[node]
        daemon.kill()
        daemon.wait()
        mine = {"SLURM_CONF": self.environ["SLURM_CONF"], "SLURMD_NODENAME": node}
        for process in psutil.process_iter() if processes else ():
            with contextlib.suppress(psutil.Error):
                if mine.items() <= process.environ().items():
                    process.kill()

    def start_node(self, node: str) -> None:
        """Start a node's daemon (again)."""
        self.daemons[node] = _daemon(["slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node], self)

    def stop(self) -> None:
        """End every job, then every daemon, and wait for them."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser(), check=False)
            self.until(self.is_empty, "an empty queue", 15)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _daemon(command: list[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground, as a child of this process, so that its end can be awaited."""
    program = shutil.which(command[0], path=SEARCH_PATH)
    assert program, command[0]
    log = (cluster.folder / "log" / f"{command[0]}-{command[-1].strip('/').replace('/', '_')[-20:]}.out").open("ab")
    with log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen([program, *command[1:]], env=cluster.environ, start_new_session=True, **streams)


def _gpu_files(folder: Path) -> str:
    """Character devices that stand for GPUs; an ordinary user cannot make any and borrows terminals."""
    devices = folder / "dev"
    devices.mkdir()
    try:
        for index in range(GPUS):
            os.mknod(devices / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return f"/dev/tty[0-{GPUS - 1}]"
    return f"{devices}/gpu[0-{GPUS - 1}]"


@contextlib.contextmanager
def local_cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    """Start a cluster in `folder` (which must be empty) and stop it afterwards.

    Args:
        folder: its path must be short: a socket's path holds about 100 characters.
        nodes: virtual nodes, named node1, node2, ...; the partitions gpu (default) and urgent have the first two, the
            partition all has all of them.
    """
    names = [f"node{index}" for index in range(1, nodes + 1)]
    per_node = [f"{place}/{name}" for place in ("spool", "tmp") for name in names]
    for place in ("munge", "state", "pid", "log", "work", *per_node):
        (folder / place).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    port, *ports = (free_port() for _ in range(nodes + 1))
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs={CPUS} "
        f"RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
        for name, own in zip(names, ports)
    ]
    text = CONFIGURATION.format(host=host, user=getpass.getuser(), folder=folder, port=port, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={_gpu_files(folder)}\n")
    # Nothing of a surrounding job or launcher belongs to this cluster.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    cluster = Cluster(folder, nodes, {**environ, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        munge = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        cluster.daemons["munged"] = _daemon(["munged", "--foreground", "--force", f"--key-file={key}", *munge], cluster)
        cluster.until((folder / "munge" / "socket").exists, "munged", 30)
        cluster.daemons["slurmctld"] = _daemon(["slurmctld", "-D", "-f", str(folder / "slurm.conf")], cluster)
        for name in names:
            cluster.start_node(name)
        cluster.until(lambda: _all_idle(cluster), "all nodes to be idle", 60)
        yield cluster
    finally:
        cluster.stop()


def _all_idle(cluster: Cluster) -> bool:
    done = cluster.run("sinfo", "-h", "-N", "-p", "all", "-o", "%T", check=False)
    return done.stdout.split() == ["idle"] * cluster.nodes


def most_at_once(intervals: list[tuple[str, str]]) -> int:
    """How many of the intervals overlap at most; one that starts as another ends does not overlap it."""
    return max(sum(start <= moment < end for start, end in intervals) for moment, _ in intervals)
