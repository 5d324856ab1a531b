"""`mor` as a person calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.cli.main import main


class Shown(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def mor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shown]:
    """`mor ARGUMENTS` in this process."""

    def run_command(*arguments: str | Path) -> Shown:
        monkeypatch.setattr(sys, "argv", ["mor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Shown(int(ended.value.code or 0), *capsys.readouterr())

    return run_command
