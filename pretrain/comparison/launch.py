"""Run one child process at a time, and stop it so that it can save.

A terminal sends Ctrl-C to its whole foreground group, and DeepSpeed's launcher then kills its ranks. So the child gets
a group (session) of its own. The first signal is passed on to the ranks alone, which finish their step, write a
checkpoint and end. A second signal kills everything. The child also ends with this process (see `supervise`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from data_prep.plain_text import say
from pretrain.comparison.experiment import EvaluationSection, LaunchSection
from pretrain.ranks.environment import clean_environment, free_port

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """The person (or Slurm) asked to stop; the child has ended."""


def training_command(launch: LaunchSection, recipe_file: Path) -> list[str]:
    """The command that trains one recipe on this machine."""
    if launch.launcher == "python":
        return [sys.executable, "-m", "pretrain.cli.main", "train", str(recipe_file)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={launch.ranks}",
        f"--master_port={free_port()}",
        str(Path(__file__).resolve().parent.parent / "train.py"),
        "--config",
        str(recipe_file),
    ]


def evaluation_arguments(settings: EvaluationSection, run: Path, suites: Sequence[str]) -> list[list[str]]:
    """Arguments of `mor eval` for one run: one command per limit among `suites`, whose order is kept."""
    limits = dict.fromkeys(settings.limit_of(suite) for suite in suites)
    return [
        [
            str(run),
            *(f"--suite={suite}" for suite in suites if settings.limit_of(suite) == limit),
            *([f"--limit={limit}"] if limit is not None else []),
            *([f"--text-bytes={settings.text_bytes}"] if settings.text_bytes is not None else []),
            *(["--hub"] if settings.hub else []),
        ]
        for limit in limits
    ]


def run_child(command: list[str], log: Path | None, tick: Callable[[], None] = lambda: None) -> int:
    """Run `command` to its end.

    Args:
        log: file that its output is appended to; None leaves it the terminal.
        tick: called about twice a second, to show progress.

    Returns:
        The exit status.

    Raises:
        Interrupted: after a signal, when the child has ended.
    """
    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("ab"))
        signals = stack.enter_context(_counting_signals())
        child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("supervise.py")), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            # Without the rank that this process may have been given; unbuffered, for the log.
            env={**clean_environment(), "PYTHONUNBUFFERED": "1"},
        )
        # The child and all that it started end with this call.
        stack.callback(_end, child)
        forwarded = 0
        while True:
            try:
                status = child.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                tick()
            if signals and forwarded == 0:
                forwarded = 1
                say(
                    "\nStopping: the ranks finish their step and write a checkpoint (Ctrl-C again ends at once).",
                    error=True,
                )
                for process in _ranks(child.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGINT)
            elif len(signals) > 1 and forwarded == 1:
                forwarded = 2
                _end(child)
    if signals:
        raise Interrupted
    return status


def last_lines(log: Path) -> str:
    """The last 15 lines of a log, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-15:])


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything in its group, at once; nothing where it has ended."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert child.stdin is not None
    child.stdin.close()


def _ranks(supervisor: int) -> list[psutil.Process]:
    """The ranks below `supervisor`: on each branch of the process tree the topmost process with a rank; the supervised
    command where no process has one.
    """
    try:
        root = psutil.Process(supervisor)
        below = root.children(recursive=True)
        command = root.children()
    except psutil.NoSuchProcess:
        return []
    with_rank = {}
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if "RANK" in process.environ():
                with_rank[process.pid] = process
    return [process for process in with_rank.values() if process.ppid() not in with_rank] or command


@contextlib.contextmanager
def _counting_signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop in a list; this process goes on."""
    seen: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in _STOP_SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
