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

    name: str
    state: State
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """Examine everything, at the same time; takes a few seconds."""
    prepare_toolchain()
    checks = [
        *(_deepspeed, _compiler, _ninja, _operators, _mpi, _slurm, _hub, _wandb),
        *(_memory, _shared_memory, _open_files, _disk),
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        others = pool.map(lambda check: check(), checks)
        return [_python(), *_torch(), *others]


def _python() -> Finding:
    outside = sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ
    where = f"{sys.executable}{', outside a virtual environment' if outside else ''}"
    return Finding("python", "ok", f"{platform.python_version()} at {where}")


def _torch() -> list[Finding]:
    """torch, the accelerator and bfloat16."""
    version = _version("torch")
    if version is None:
        return [Finding("torch", "broken", "not installed", "make install")]
    shown = _run([sys.executable, "-c", _ASK_TORCH], seconds=_BUSY)
    if shown is None:
        detail = f"{version} does not import within {_BUSY:.0f} s"
        return [Finding("torch", "broken", detail, f"{sys.executable} -c 'import torch' shows the reason")]
    facts = json.loads(shown.splitlines()[-1])
    build = f"build for {facts['build']}" if facts["build"] else "CPU build"
    found = [Finding("torch", "ok", f"{version}, {build}, {facts['threads']} threads")]
    if facts["gpus"]:
        found.append(Finding("accelerator", "ok", f"{facts['gpus']} x {'; '.join(facts['names'])}"))
    elif accelerator_present():
        advice = "install the torch build for its driver (torch in constraints.txt), then look at nvidia-smi"
        found.append(Finding("accelerator", "broken", "there is a device, but torch sees none", advice))
    else:
        advice = "fine for small models and for tests"
        found.append(Finding("accelerator", "absent", "no GPU; training runs on the CPU", advice))
    instructions = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in _cpu_flags()), None)
    if facts["bf16"]:
        found.append(Finding("bfloat16", "ok", "the GPU computes in it"))
    elif not accelerator_present() and instructions:
        found.append(Finding("bfloat16", "ok", f"the CPU computes in it ({instructions})"))
    else:
        found.append(Finding("bfloat16", "absent", "no hardware for it", "recipes with precision auto use fp32 here"))
    return found


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    if version is None:
        return Finding("deepspeed", "broken", "not installed", "make install")
    if not shutil.which("deepspeed") and not (Path(sys.executable).parent / "deepspeed").exists():
        return Finding("deepspeed", "absent", f"{version}, without its launcher on PATH", "activate the environment")
    return Finding("deepspeed", "ok", version)


def _compiler() -> Finding:
    program = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    advice = "DeepSpeed compiles operators when it first needs them; on Debian: apt-get install g++"
    if program is None:
        return Finding("C++ compiler", "absent", "none found", advice)
    command = [program, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    if _run(command, given="#include <optional>\nint main() {}\n", seconds=_BUSY) is None:
        return Finding("C++ compiler", "broken", f"{program} does not compile C++17", advice)
    first = ((_run([program, "--version"]) or "").splitlines() or [program])[0]
    if accelerator_present() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        advice = "fused operators for the GPU need nvcc (module load cuda, or set CUDA_HOME); training works without"
        return Finding("C++ compiler", "absent", f"{first}, but no nvcc", advice)
    return Finding("C++ compiler", "ok", first)


def _ninja() -> Finding:
    program = shutil.which("ninja")
    version = _run([program, "--version"], seconds=_BUSY) if program else None
    if version is None:
        return Finding("ninja", "broken", "not found", f"{sys.executable} -m pip install ninja")
    return Finding("ninja", "ok", f"{version.strip()} at {program}")


def _operators() -> Finding:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    built = sorted({file.stem for file in folder.glob("**/*.so")})
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    if not os.access(parent, os.W_OK):
        advice = "set TORCH_EXTENSIONS_DIR to another folder"
        return Finding("DeepSpeed operators", "broken", f"{folder} is not writable", advice)
    if not built:
        advice = "the first run builds what it needs (about half a minute each)"
        return Finding("DeepSpeed operators", "absent", f"none built yet in {folder}", advice)
    return Finding("DeepSpeed operators", "ok", f"built: {', '.join(built)} in {folder}")


def _mpi() -> Finding:
    advice = "only for starting with mpirun: pip install 'mor-pretrain[mpi]', or your system's MPI"
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        return Finding("MPI", "absent", "no mpirun", advice)
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    library = _run([sys.executable, "-c", code], seconds=_BUSY)
    if library is None:
        return Finding("MPI", "absent", f"{mpirun}, but mpi4py does not find its library", advice)
    return Finding("MPI", "ok", f"{mpirun}; mpi4py uses {library.strip().strip(chr(0)).split(',')[0]}")


def _slurm() -> Finding:
    if not shutil.which("sbatch"):
        advice = "only for clusters; mor submit --local runs a chain without it"
        return Finding("Slurm", "absent", "no sbatch here", advice)
    shown = _run(["sinfo", "--noheader", "--format=%P %D x %c CPUs %G"])
    if shown is None:
        return Finding("Slurm", "absent", "installed, but no controller answers", "run this on a login node")
    return Finding("Slurm", "ok", "; ".join(line.strip() for line in shown.splitlines()) or "no partitions")


def _hub() -> Finding:
    advice = "data sets and tokenizers must be local paths; the built-in corpus python-docs needs no network"
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return Finding("hub", "absent", "switched off by HF_HUB_OFFLINE", advice)
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code in (403, 407):
            return Finding("hub", "absent", f"{address} answers {error.code}", advice)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error)).splitlines()[0][:80]
        return Finding("hub", "absent", f"{address} cannot be reached ({reason})", advice)
    return Finding("hub", "ok", address)


def _wandb() -> Finding:
    version = _version("wandb")
    if version is None:
        return Finding("wandb", "absent", "not installed", "pip install wandb; metrics.jsonl is written in any case")
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("wandb", "ok", f"{version}, WANDB_MODE={mode}")
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    known = "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError):
        known = known or "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    if not known:
        return Finding("wandb", "absent", f"{version}, not logged in", "wandb login, or logging.wandb=offline")
    return Finding("wandb", "ok", f"{version}, logged in")


def _memory() -> Finding:
    import psutil

    gib = psutil.virtual_memory().available / 2**30
    detail = f"{gib:.1f} GiB free, {os.cpu_count()} cores"
    if gib < 6:
        return Finding("memory", "absent", detail, "the quickstart needs 6 GiB; close other programs")
    return Finding("memory", "ok", detail)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "absent", "no /dev/shm", "in a container: mount one (docker run --shm-size=8g)")
    free = shutil.disk_usage(folder).free
    if free < 2**29:
        advice = "GPUs of one node communicate through it; in a container: docker run --shm-size=8g"
        state: State = "broken" if accelerator_present() else "absent"
        return Finding("shared memory", state, f"{free / 2**20:.0f} MiB free in /dev/shm", advice)
    return Finding("shared memory", "ok", f"{free / 2**30:.1f} GiB free in /dev/shm")


def _open_files() -> Finding:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = ("unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in limits)
    if soft != "unlimited" and int(soft) < 1024:
        return Finding("open files", "absent", f"at most {soft}", f"ulimit -n {hard}")
    return Finding("open files", "ok", soft if soft == "unlimited" else f"at most {soft}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    detail = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < 5:
        return Finding("disk", "absent", detail, "a checkpoint has up to 16 bytes per parameter")
    return Finding("disk", "ok", detail)


def _cpu_flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return line.split()
    return []


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
