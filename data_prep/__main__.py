"""`python -m data_prep`."""

from __future__ import annotations

import sys

from data_prep.plain_text import say

if __name__ == "__main__":
    from data_prep.cli import app
    from data_prep.errors import DataError

    try:
        app(prog_name="python -m data_prep")
    except DataError as error:
        say(f"data_prep: {error}", error=True)
        sys.exit(2)
