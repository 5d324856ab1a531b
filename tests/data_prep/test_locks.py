"""The lock that keeps other processes out of a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data_prep import locks
from data_prep.errors import DataError
from data_prep.locks import locked

HOLDER = """
import sys
from pathlib import Path
from data_prep.locks import locked
with locked(Path(sys.argv[1]), "taken", patience=0.0):
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_or_waited_for_and_a_killed_one_leaves_the_lock_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "folder" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        refused = rf'^busy \(\{{"host": .*"process": {holder.pid},.*\); go away\.$'
        with pytest.raises(DataError, match=refused), locked(file, "busy", patience=0.0, advice="go away"):
            pass
        monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
        threading.Timer(0.2, holder.kill).start()
        with locked(file, "busy") as text:
            assert json.loads(text)["process"] == os.getpid()
    assert capsys.readouterr().err.count("; waiting for it.") == 1
    assert file.read_text(encoding="utf-8") == text


def test_a_file_system_without_locks_has_none_and_other_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_with(number: int) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", refuse)

    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
        fails_with(number)
        with locked(tmp_path / "lock", "busy", patience=0.0):
            pass
    fails_with(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock", "busy"):
        pass
