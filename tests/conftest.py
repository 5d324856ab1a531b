"""What every test may use: the shared corpora, and one way to skip for something that is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.surroundings import normalize

normalize()

# Tests that gate draw the same examples every time, or a rare one turns away work it has nothing to do with; new ones
# are looked for by `make test-slow`, which draws at random and prints what reproduces a failure. How long one takes
# says how busy the machine is.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile("same")


def skip_or_fail(reason: str) -> None:
    """Skip the test for a tool that is absent; where everything must be there (`MOR_REQUIRE_ALL=1`), fail instead."""
    if os.environ.get("MOR_REQUIRE_ALL") == "1":
        pytest.fail(f"MOR_REQUIRE_ALL=1 and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora, evaluation sets and tokenizers (`MOR_SHARED_DATA`)."""
    folder = os.environ.get("MOR_SHARED_DATA")
    if not folder:
        pytest.skip("MOR_SHARED_DATA is not set: point it at a folder with train/, valid/, eval/ and tokenizers/")
    if not Path(str(folder)).is_dir():
        pytest.fail(f"MOR_SHARED_DATA={folder} is not a folder")
    return Path(str(folder))
