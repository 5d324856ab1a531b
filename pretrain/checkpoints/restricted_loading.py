"""Reading DeepSpeed's `.pt` files without running what they contain.

They are pickles, which can name any function and have it called. torch's restricted reader (`weights_only`) builds
tensors, numbers and plain containers, and the classes that are allowed here: what checkpoints of all ZeRO stages hold
beside those. They only hold values.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.plain_text import plain
from pretrain.errors import RunError

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def restricted_loading(where: Path) -> Iterator[None]:
    """Within it, torch reads every file as `load_restricted` does, even where the caller (DeepSpeed) asks for the
    opposite. Processes that are forked within it are restricted too.

    Args:
        where: what is being read, for the message.

    Raises:
        RunError: for a file that names something which is not allowed.
    """
    _allow_classes()
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _refusal(where, error) from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def load_restricted(file: Path, map_location: Any = None, mmap: bool = False) -> Any:
    """The contents of a `.pt` file.

    Args:
        map_location, mmap: as torch.load.

    Raises:
        RunError: for a file that names something which is not allowed, or that torch.save has not written.
    """
    _allow_classes()
    try:
        return torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can raise any exception in torch's reader
        raise _refusal(file, error) from None


def refuse_code(file: Path) -> None:
    """Check what a `.pt` file would build, without reading its tensors.

    Raises:
        RunError: as `load_restricted`.
    """
    load_restricted(file, map_location="meta", mmap=True)


@functools.cache
def _allow_classes() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # For the whole process: torch's scopes for this do not nest.
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def _refusal(where: Path, error: Exception) -> RunError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is not None:
        return RunError(
            f"{where}: names {plain(named[1])[:200]}, which no checkpoint needs: it was changed, or not written "
            "by this project. Nothing of it was run. Remove that checkpoint, or restore it from a copy that you trust."
        )
    reason = plain((str(error).splitlines() or [""])[0])[:200]
    return RunError(
        f"{where}: is not a file that a checkpoint consists of ({type(error).__name__}: {reason}). Remove that "
        "checkpoint, or restore it from a copy that you trust."
    )
