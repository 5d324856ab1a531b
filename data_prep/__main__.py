"""`python -m data_prep`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from data_prep.cli import app
    from data_prep.errors import DataError

    try:
        app(prog_name="python -m data_prep")
    except DataError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        sys.exit(2)
