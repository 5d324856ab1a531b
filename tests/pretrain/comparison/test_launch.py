from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from pretrain.comparison.launch import run_child

ROOT = Path(__file__).resolve().parents[3]

# A launcher in the manner of DeepSpeed's: it gives its children ranks, and dies at once of a signal of its own.
LAUNCHER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
# A rank that needs a moment to save its work, in a process tree with a helper that inherited its rank.
RANK = """
import os, pathlib, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
here = pathlib.Path(sys.argv[0]).parent
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(time.time()))
(here / f"ready-{os.environ['RANK']}").touch()
while not asked:
    time.sleep(0.02)
(here / f"asked-{os.environ['RANK']}").touch()
time.sleep(0.5)
alive = helper.poll() is None
helper.kill()
(here / f"saved-{os.environ['RANK']}").write_text(f"{len(asked)} {alive}")
sys.exit(75)
"""


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def start_ranks(folder: Path, rank: str = RANK) -> subprocess.Popen:
    """The launcher as the child of a process of its own, when its ranks are ready."""
    (folder / "launcher.py").write_text(LAUNCHER)
    (folder / "rank.py").write_text(rank)
    parent = start_parent(folder, [sys.executable, str(folder / "launcher.py"), str(folder / "rank.py")])
    wait_for(lambda: len(list(folder.glob("ready-*"))) == 2)
    return parent


def start_parent(folder: Path, command: list[str]) -> subprocess.Popen:
    """A process of its own that runs the command as `mor compare` does, in a group of its own like a terminal's."""
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from pretrain.comparison.launch import Interrupted, run_child
        try:
            print("ended", run_child({command!r}, Path({str(folder / "log")!r})))
        except Interrupted:
            print("interrupted")
    """)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_once_and_they_are_waited_for(tmp_path, number):
    parent = start_ranks(tmp_path)
    # As a terminal does it: to the whole foreground group.
    os.killpg(parent.pid, number)
    output, errors = parent.communicate(timeout=120)
    assert output.strip() == "interrupted" and "write a checkpoint" in errors
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1 True", "1 True"]


def test_a_second_signal_ends_everything_at_once(tmp_path):
    parent = start_ranks(tmp_path, RANK.replace("time.sleep(0.5)", "helper.wait()"))
    os.kill(parent.pid, signal.SIGINT)
    wait_for(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    os.kill(parent.pid, signal.SIGINT)
    output, _ = parent.communicate(timeout=120)
    assert output.strip() == "interrupted"
    assert not list(tmp_path.glob("saved-*"))


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    parent = start_ranks(tmp_path)
    below = [process.pid for process in psutil.Process(parent.pid).children(recursive=True)]
    assert len(below) >= 6  # launcher, ranks and their helpers, and what watches over them
    parent.kill()
    parent.communicate(timeout=120)
    wait_for(lambda: not any(map(alive, below)))
    assert not list(tmp_path.glob("asked-*"))


def test_nothing_outlives_an_error_of_the_parent(tmp_path):
    log = tmp_path / "log"

    def tick() -> None:
        wait_for(log.read_text)
        raise KeyError("in the display")

    with pytest.raises(KeyError):
        run_child([sys.executable, "-c", "import os, signal; print(os.getpid()); signal.pause()"], log, tick)
    wait_for(lambda: not alive(int(log.read_text())))


def test_output_goes_to_the_log_and_the_status_comes_back(tmp_path, monkeypatch):
    """And the child inherits no rank of its parent."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    code = (
        "import os, pathlib, sys, time\n"
        "print([name for name in os.environ if name in ('RANK', 'SLURM_PROCID')])\n"
        "while not pathlib.Path(sys.argv[1]).exists():\n"
        "    time.sleep(0.02)\n"
        "sys.exit(3)\n"
    )
    before = signal.getsignal(signal.SIGINT)
    tick = tmp_path / "tick"
    assert run_child([sys.executable, "-c", code, str(tick)], tmp_path / "logs" / "log", tick.touch) == 3
    assert (tmp_path / "logs" / "log").read_text() == "[]\n"
    assert signal.getsignal(signal.SIGINT) is before
    died = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert run_child(died, tmp_path / "logs" / "log") == 128 + signal.SIGKILL


def test_a_signal_before_any_rank_exists_goes_to_the_child_itself(tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGINT, lambda *_: ((here / 'told').touch(), sys.exit(75)))\n"
        "(here / 'ready').touch()\n"
        "signal.pause()\n"
    )
    parent = start_parent(tmp_path, [sys.executable, "-c", code])
    wait_for((tmp_path / "ready").exists)
    os.kill(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=120)[0].strip() == "interrupted"
    assert (tmp_path / "told").exists()
