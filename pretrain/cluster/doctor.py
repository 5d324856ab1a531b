"""What of this machine works, and what to do about the rest: one finding for each thing that training needs or uses.

Nothing here needs a network or changes anything; what could hang runs in a process of its own with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.ranks.toolchain import accelerator_present, prepare_toolchain

State = Literal["ok", "absent", "broken"]
_PATIENCE = 20.0  # seconds, for programs that may not answer
_BUSY = 150.0  # seconds, for programs that answer, on a busy node with a slow file server
_ASK_TORCH = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({
    "build": torch.version.cuda or torch.version.hip,
    "threads": torch.get_num_threads(),
    "gpus": gpus,
    "names": sorted({torch.cuda.get_device_name(index) for index in range(gpus)}),
    "bf16": bool(gpus) and torch.cuda.is_bf16_supported(),
}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        state: `absent` is something optional that is missing; `broken` is something without which training fails.
        advice: what to do about either.
    """

    state: State
    detail: str
    advice: str = ""


def examine() -> dict[str, Finding]:
    """Examine everything, at the same time; takes a few seconds."""
    prepare_toolchain()
    checks = {
        "deepspeed": _deepspeed,
        "C++ compiler": _compiler,
        "ninja": _ninja,
        "DeepSpeed operators": _operators,
        "MPI": _mpi,
        "Slurm": _slurm,
        "hub": _hub,
        "wandb": _wandb,
        "memory": _memory,
        "shared memory": _shared_memory,
        "open files": _open_files,
        "disk": _disk,
    }
    with ThreadPoolExecutor(len(checks)) as pool:
        others = pool.map(lambda check: check(), checks.values())
        return {"python": _python(), **_torch(), **dict(zip(checks, others))}


def _python() -> Finding:
    outside = sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ
    where = f"{sys.executable}{', outside a virtual environment' if outside else ''}"
    return Finding("ok", f"{platform.python_version()} at {where}")


def _torch() -> dict[str, Finding]:
    """torch, the accelerator and bfloat16."""
    version = _version("torch")
    shown = _run([sys.executable, "-c", _ASK_TORCH], seconds=_BUSY)
    if shown is None:
        detail = f"{version} does not import within {_BUSY:.0f} s" if version else "not installed"
        advice = f"make install; {sys.executable} -c 'import torch' shows the reason"
        return {"torch": Finding("broken", detail, advice)}
    facts = json.loads(shown.splitlines()[-1])
    build = f"build for {facts['build']}" if facts["build"] else "CPU build"
    found = {"torch": Finding("ok", f"{version}, {build}, {facts['threads']} threads")}
    if facts["gpus"]:
        found["accelerator"] = Finding("ok", f"{facts['gpus']} x {'; '.join(facts['names'])}")
    elif accelerator_present():
        advice = "install the torch build for its driver (torch in constraints.txt), then look at nvidia-smi"
        found["accelerator"] = Finding("broken", "there is a device, but torch sees none", advice)
    else:
        detail = "no GPU; training runs on the CPU"
        found["accelerator"] = Finding("absent", detail, "fine for small models and for tests")
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8").split() if cpu.exists() else []
    instructions = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)
    if facts["bf16"]:
        found["bfloat16"] = Finding("ok", "the GPU computes in it")
    elif not accelerator_present() and instructions:
        found["bfloat16"] = Finding("ok", f"the CPU computes in it ({instructions})")
    else:
        found["bfloat16"] = Finding("absent", "no hardware for it", "recipes with precision auto use fp32 here")
    return found


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    if version is None:
        return Finding("broken", "not installed", "make install")
    if not shutil.which("deepspeed") and not (Path(sys.executable).parent / "deepspeed").exists():
        return Finding("absent", f"{version}, without its launcher on PATH", "activate the environment")
    return Finding("ok", version)


def _compiler() -> Finding:
    program = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    advice = "DeepSpeed compiles operators when it first needs them; on Debian: apt-get install g++"
    if program is None:
        return Finding("absent", "none found", advice)
    command = [program, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    if _run(command, given="#include <optional>\nint main() {}\n", seconds=_BUSY) is None:
        return Finding("broken", f"{program} does not compile C++17", advice)
    first = ((_run([program, "--version"]) or "").splitlines() or [program])[0]
    if accelerator_present() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        advice = "fused operators for the GPU need nvcc (module load cuda, or set CUDA_HOME); training works without"
        return Finding("absent", f"{first}, but no nvcc", advice)
    return Finding("ok", first)


def _ninja() -> Finding:
    program = shutil.which("ninja")
    version = _run([program, "--version"], seconds=_BUSY) if program else None
    if version is None:
        return Finding("broken", "not found", f"{sys.executable} -m pip install ninja")
    return Finding("ok", f"{version.strip()} at {program}")


def _operators() -> Finding:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    built = sorted({file.stem for file in folder.glob("**/*.so")})
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return Finding("broken", f"{folder} is not writable", "set TORCH_EXTENSIONS_DIR to another folder")
    if not built:
        advice = "the first run builds what it needs (about half a minute each)"
        return Finding("absent", f"none built yet in {folder}", advice)
    return Finding("ok", f"built: {', '.join(built)} in {folder}")


def _mpi() -> Finding:
    advice = "only for starting with mpirun: pip install 'mor-pretrain[mpi]', or your system's MPI"
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        return Finding("absent", "no mpirun", advice)
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    library = _run([sys.executable, "-c", code], seconds=_BUSY)
    if library is None:
        return Finding("absent", f"{mpirun}, but mpi4py does not find its library", advice)
    return Finding("ok", f"{mpirun}; mpi4py uses {library.strip().strip(chr(0)).split(',')[0]}")


def _slurm() -> Finding:
    if not shutil.which("sbatch"):
        return Finding("absent", "no sbatch here", "only for clusters; mor submit --local runs a chain without it")
    shown = _run(["sinfo", "--noheader", "--format=%P %D x %c CPUs %G"])
    if shown is None:
        return Finding("absent", "installed, but no controller answers", "run this on a login node")
    return Finding("ok", "; ".join(line.strip() for line in shown.splitlines()) or "no partitions")


def _hub() -> Finding:
    advice = "data sets and tokenizers must be local paths; the built-in corpus python-docs needs no network"
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return Finding("absent", "switched off by HF_HUB_OFFLINE", advice)
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code in (403, 407):
            return Finding("absent", f"{address} answers {error.code}", advice)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error)).splitlines()[0][:80]
        return Finding("absent", f"{address} cannot be reached ({reason})", advice)
    return Finding("ok", address)


def _wandb() -> Finding:
    version = _version("wandb")
    if version is None:
        return Finding("absent", "not installed", "pip install wandb; metrics.jsonl is written in any case")
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        return Finding("ok", f"{version}, WANDB_MODE={mode}")
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    known = "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError):
        known = known or "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    if not known:
        return Finding("absent", f"{version}, not logged in", "wandb login, or logging.wandb=offline")
    return Finding("ok", f"{version}, logged in")


def _memory() -> Finding:
    import psutil

    gib = psutil.virtual_memory().available / 2**30
    detail = f"{gib:.1f} GiB free, {os.cpu_count()} cores"
    if gib < 6:
        return Finding("absent", detail, "the quickstart needs 6 GiB; close other programs")
    return Finding("ok", detail)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("absent", "no /dev/shm", "in a container: mount one (docker run --shm-size=8g)")
    free = shutil.disk_usage(folder).free
    if free < 2**29:
        advice = "GPUs of one node communicate through it; in a container: docker run --shm-size=8g"
        state: State = "broken" if accelerator_present() else "absent"
        return Finding(state, f"{free / 2**20:.0f} MiB free in /dev/shm", advice)
    return Finding("ok", f"{free / 2**30:.1f} GiB free in /dev/shm")


def _open_files() -> Finding:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return Finding("ok", "unlimited")
    return Finding("ok" if limit >= 1024 else "absent", f"at most {limit}", "" if limit >= 1024 else "ulimit -n 4096")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    detail = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < 5:
        return Finding("absent", detail, "a checkpoint has up to 16 bytes per parameter")
    return Finding("ok", detail)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(command: list[str], given: str | None = None, seconds: float = _PATIENCE) -> str | None:
    """What a command prints; None if it fails, takes longer than `seconds`, or does not exist."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
