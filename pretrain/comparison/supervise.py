"""Run a command, and end everything it started when the process that asked for it has ended, however it ended.

    python supervise.py COMMAND...

Standard input is a pipe that only the asking process holds open: the kernel closes it with that process, after SIGKILL
too. This file is started by its path, imports nothing of the project, and leads the process group (session) that the
command and its children are in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Returns the command's exit status; 128 and the signal's number where it died of one."""
    # Signals to the group are for the command, which ends when it has saved. A handler, unlike SIG_IGN, is not
    # inherited.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_with_the_asker() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    # Without Python's own shutdown, which could wait for the thread that reads.
    os._exit(main(sys.argv[1:]))
