"""A rank under srun: polite ends count as success there, because srun kills the other ranks at the first other code.

Rank 0 leaves the code it really ended with in the file that MOR_EXIT_CODE_FILE names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pretrain.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_HELD
from pretrain.train import main as train


def main(arguments: list[str]) -> int:
    """Train as `pretrain/train.py` does."""
    code = train(arguments)
    if code not in (EXIT_AGAIN, EXIT_HELD):
        return code
    if os.environ["RANK"] == "0":
        Path(os.environ["MOR_EXIT_CODE_FILE"]).write_text(str(code), encoding="utf-8")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
