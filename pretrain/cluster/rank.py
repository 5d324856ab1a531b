"""A rank under srun. A stop with a checkpoint ends with 0 here, because srun kills all ranks at the first other code.

The rank's own exit code is first written into MOR_EXIT_CODE_FILE.<rank>: by rank 0 always, by the others only if it is
2, because another start would end the same way.
"""

from __future__ import annotations

import contextlib
import os
import sys

from data_prep.files import write_text
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_HELD, EXIT_USER
from pretrain.train import leave
from pretrain.train import main as train


def main(arguments: list[str]) -> int:
    """Train as `pretrain/train.py` does."""
    code = train(arguments)
    # RANK is not set if the launcher's own variables could not be used.
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    if rank == "0" or code == EXIT_USER:
        # On a full disk there is no such file, and the job uses srun's code.
        with contextlib.suppress(OSError):
            write_text(f"{os.environ['MOR_EXIT_CODE_FILE']}.{rank}", str(code))
    return EXIT_FINISHED if code in (EXIT_AGAIN, EXIT_HELD) else code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
