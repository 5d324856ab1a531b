"""Ranks as forks of one process that has imported everything, so that each starts in a moment and can be killed alone.

Reads JSON lines {"script", "arguments", "variables", "output", "errors"} and forks a rank for each, answering
{"pid": ...}; {"pid": ...} is answered with {"code": ...}, null while the rank still runs.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

import deepspeed  # noqa: F401
import torch  # noqa: F401


def main() -> None:
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "script" in request:
            answer: dict[str, Any] = {"pid": _fork(request)}
        else:
            answer = {"code": _poll(request["pid"], codes)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    # Of this process a rank keeps what is imported, and nothing else.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["variables"])
    sys.argv = [request["script"], *request["arguments"]]
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _poll(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


if __name__ == "__main__":
    main()
