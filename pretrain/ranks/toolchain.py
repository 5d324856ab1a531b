"""Compiler tools, build folder and accelerator for DeepSpeed's operators, so that nothing is exported by hand."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from pretrain.errors import LaunchError

_LOG = logging.getLogger(__name__)
_NAME_A_FOLDER = "set TORCH_EXTENSIONS_DIR to a folder of your own."


def prepare_toolchain(*, shared_host: bool = True) -> None:
    """Let DeepSpeed find its compiler tools, its build folder and the right accelerator.

    Args:
        shared_host: whether every process that may be building now runs on this host.

    Raises:
        LaunchError: a lock that torch would wait for without end cannot be removed, or there is no safe build folder.
    """
    if shutil.which("ninja") is None:
        import ninja  # here, because the batch script of a job imports this file with the standard library alone

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_extensions_folder())
    _remove_abandoned_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]), shared_host)
    if not accelerator_present():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def accelerator_present(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the machine has a device other than its CPU, from its device files alone, which costs nothing."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    patterns = ("nvidia[0-9]*", "kfd", "dxg", "davinci[0-9]*", "dri/renderD*", "accel/accel*", "nvhpu*")
    return any(next(Path("/dev").glob(pattern), None) is not None for pattern in patterns)


def _extensions_folder() -> Path:
    """One build folder per environment: two environments that share one would rebuild each other's operators."""
    environment = Path(sys.prefix)
    if (sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ) and os.access(environment, os.W_OK):
        return environment / "torch_extensions"
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else None)
    ours = Path(cache, "mor") if cache else _temporary_folder()  # a container's user may have no home
    return ours / f"torch_extensions-{zlib.crc32(str(environment).encode()):08x}"


def _temporary_folder() -> Path:
    """A temporary folder that no other user can write to, because what is built there is loaded."""
    folder = Path(tempfile.gettempdir(), f"mor-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise LaunchError(f"{folder}: cannot be made ({error.strerror}); {_NAME_A_FOLDER}") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise LaunchError(f"{folder}: other users can write to it, and what is built there is loaded; {_NAME_A_FOLDER}")
    return folder


def _remove_abandoned_locks(extensions: Path, shared_host: bool) -> None:
    """Remove build locks whose builder was killed: torch waits for such a lock without end."""
    suspects = [lock for lock in extensions.glob("**/lock") if _is_abandoned(lock, shared_host)]
    if suspects:
        time.sleep(0.5)  # torch closes the file just before it removes it
    for lock in suspects:
        if not _is_abandoned(lock, shared_host):
            continue
        try:
            lock.unlink(missing_ok=True)
        except OSError as error:
            raise LaunchError(
                f"{lock}: the process that was building there is gone, and its lock cannot be removed "
                f"({error.strerror}); remove it, or {_NAME_A_FOLDER}"
            ) from None
        _LOG.warning("Removed %s: the process that was building there is gone.", lock)


def _is_abandoned(lock: Path, shared_host: bool) -> bool:
    """Whether the lock exists and no process of this host holds it open, as torch does while it builds. A builder on
    another host gets ten minutes.
    """
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    if not shared_host and age <= 600:
        return False
    name = str(lock.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == name:
                return False
    return True
