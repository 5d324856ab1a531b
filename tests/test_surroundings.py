"""What the tests are started with does not reach them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SHOW = """
import os
import tests.conftest
started = ("import os, signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, "
           "signal.getsignal(signal.SIGHUP) is signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "
           "oct(os.umask(0)), [n for n in ('FORCE_COLOR', 'COLUMNS', 'RANK', 'SLURM_JOB_ID', 'MOR_SETUP') "
           "if n in os.environ], 'MOR_REQUIRE_ALL' in os.environ)")
os.execv(os.sys.executable, [os.sys.executable, "-c", started])
"""


def strange() -> None:
    import signal

    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_signals_variables_and_modes_are_those_of_a_plain_shell():
    names = {"FORCE_COLOR": "1", "COLUMNS": "40", "RANK": "3", "SLURM_JOB_ID": "7", "MOR_SETUP": "false"}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, **names, "MOR_REQUIRE_ALL": "1"},
        cwd=Path(__file__).resolve().parent.parent,
        preexec_fn=strange,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "True True True 0o22 [] True\n"
