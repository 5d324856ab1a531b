"""What of this machine works, and what to do about what does not: one finding for each thing training can stumble over.

Nothing here needs a network or changes anything; whatever could hang runs in a process of its own with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.ranks.toolchain import accelerator_present, prepare_toolchain

State = Literal["ok", "absent", "broken"]
_PATIENCE = 20.0  # with what may answer or not
_BUSY = 150.0  # with what works, on a busy node with a slow file server


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `absent` is something optional that is not there, `broken` something without which training fails; `advice` says
    what to do about either.
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds, in which the checks run beside one another."""
    prepare_toolchain()
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _accelerator,
        _bf16,
        _deepspeed,
        _compiler,
        _ninja,
        _operators,
        _mpi,
        _slurm,
        _hub,
        _wandb,
        _memory,
        _shared_memory,
        _open_files,
        _disk,
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        return list(pool.map(lambda check: check(), checks))


def _python() -> Finding:
    version = platform.python_version()
    detail = f"{version} at {sys.executable}"
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        return Finding("python", "ok", f"{detail}, outside a virtual environment")
    return Finding("python", "ok", detail)


def _torch() -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "broken", "not installed", "make install")
    shown = _python_says(
        "import torch; print(torch.version.cuda or torch.version.hip or 'CPU', torch.get_num_threads())"
    )
    if shown is None:
        detail = f"{version} does not import within {_BUSY:.0f} s"
        return Finding("torch", "broken", detail, f"{sys.executable} -c 'import torch' says why")
    build, threads = shown.split()
    return Finding(
        "torch", "ok", f"{version}, {'CPU build' if build == 'CPU' else f'build for {build}'}, {threads} threads"
    )


def _accelerator() -> Finding:
    if not accelerator_present():
        return Finding(
            "accelerator", "absent", "no GPU; training runs on the CPU", "fine for small models and for tests"
        )
    shown = _python_says(
        "import torch; n = torch.cuda.device_count()\n"
        "print(n, '; '.join(sorted({torch.cuda.get_device_name(i) for i in range(n)})), sep='|')"
    )
    count, _, names = (shown or "0|").partition("|")
    if count == "0":
        advice = (
            "install the torch build for its driver (change the torch line of constraints.txt), then look at nvidia-smi"
        )
        return Finding("accelerator", "broken", "there is a device, but torch sees none", advice)
    return Finding("accelerator", "ok", f"{count} x {names}")


def _bf16() -> Finding:
    if accelerator_present():
        shown = _python_says("import torch; print(torch.cuda.is_available() and torch.cuda.is_bf16_supported())")
        if shown == "True":
            return Finding("bfloat16", "ok", "the GPU computes in it")
        return Finding(
            "bfloat16", "absent", "not on this GPU", "recipes with precision auto use fp32; fp16 is a choice"
        )
    flags = _cpu_flags()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return Finding("bfloat16", "ok", f"the CPU computes in it ({flag})")
    return Finding("bfloat16", "absent", "not in this CPU's instructions", "recipes with precision auto use fp32 here")


def _deepspeed() -> Finding:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return Finding("deepspeed", "broken", "not installed", "make install")
    if not shutil.which("deepspeed") and not (Path(sys.executable).parent / "deepspeed").exists():
        return Finding("deepspeed", "absent", f"{version}, without its launcher on PATH", "activate the environment")
    return Finding("deepspeed", "ok", version)


def _compiler() -> Finding:
    program = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    advice = "DeepSpeed compiles operators when it first needs them; on Debian: apt-get install g++"
    if program is None:
        return Finding("C++ compiler", "absent", "none found", advice)
    done = _run(
        [program, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"],
        given="#include <optional>\nint main() {}\n",
        seconds=_BUSY,
    )
    if done is None or done.returncode:
        return Finding("C++ compiler", "broken", f"{program} does not compile C++17", advice)
    shown = _run([program, "--version"])
    first = shown.stdout.splitlines()[0] if shown and shown.stdout else program
    if accelerator_present() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        advice = "fused operators for the GPU need nvcc (module load cuda, or set CUDA_HOME); training works without"
        return Finding("C++ compiler", "absent", f"{first}, but no nvcc", advice)
    return Finding("C++ compiler", "ok", first)


def _ninja() -> Finding:
    program = shutil.which("ninja")
    done = _run([program, "--version"], seconds=_BUSY) if program else None
    if done is None or done.returncode:
        return Finding("ninja", "broken", "not found", f"{sys.executable} -m pip install ninja")
    return Finding("ninja", "ok", f"{done.stdout.strip()} at {program}")


def _operators() -> Finding:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    built = sorted({file.stem for file in folder.glob("**/*.so")})
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return Finding(
            "DeepSpeed operators", "broken", f"{folder} is not writable", "set TORCH_EXTENSIONS_DIR elsewhere"
        )
    if not built:
        advice = "the first run builds what it needs (about half a minute each)"
        return Finding("DeepSpeed operators", "absent", f"none built yet in {folder}", advice)
    return Finding("DeepSpeed operators", "ok", f"built: {', '.join(built)} in {folder}")


def _mpi() -> Finding:
    advice = "only for starting with mpirun: pip install 'mor-pretrain[mpi]', or your system's MPI"
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    library = _python_says("from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])")
    if mpirun is None:
        return Finding("MPI", "absent", "no mpirun", advice)
    if library is None:
        return Finding("MPI", "absent", f"{mpirun}, but mpi4py does not find its library", advice)
    return Finding("MPI", "ok", f"{mpirun}; mpi4py uses {library.strip(chr(0)).split(',')[0]}")


def _slurm() -> Finding:
    if not shutil.which("sbatch"):
        return Finding(
            "Slurm", "absent", "no sbatch here", "only for clusters; mor submit --local runs a chain without it"
        )
    done = _run(["sinfo", "--noheader", "--format=%P %D x %c CPUs %G"])
    if done is None or done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1] if done else "no answer"
        return Finding(
            "Slurm", "absent", f"installed, but no controller answers ({reason})", "run this on a login node"
        )
    return Finding("Slurm", "ok", "; ".join(line.strip() for line in done.stdout.splitlines()) or "no partitions")


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
        return Finding("hub", "absent", f"{address} cannot be reached ({_short(error)})", advice)
    return Finding("hub", "ok", address)


def _wandb() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding("wandb", "absent", "not installed", "pip install wandb; metrics.jsonl is written in any case")
    version = importlib.metadata.version("wandb")
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
        return Finding("memory", "absent", detail, "the quickstart wants 6 GiB; close other programs")
    return Finding("memory", "ok", detail)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "absent", "no /dev/shm", "in a container: mount one (docker run --shm-size=8g)")
    free = shutil.disk_usage(folder).free
    if free < 2**29:
        advice = "GPUs of one node talk through it; in a container: docker run --shm-size=8g"
        state: State = "broken" if accelerator_present() else "absent"
        return Finding("shared memory", state, f"{free / 2**20:.0f} MiB free in /dev/shm", advice)
    return Finding("shared memory", "ok", f"{free / 2**30:.1f} GiB free in /dev/shm")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        advice = f"ulimit -n {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
        return Finding("open files", "absent", f"at most {soft}", advice)
    return Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 5:
        return Finding(
            "disk", "absent", f"{free:.1f} GiB free in {Path.cwd()}", "a checkpoint has 16 bytes a parameter"
        )
    return Finding("disk", "ok", f"{free:.0f} GiB free in {Path.cwd()}")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _python_says(code: str) -> str | None:
    """What a fresh interpreter prints; None when it fails or takes too long."""
    done = _run([sys.executable, "-c", code], seconds=_BUSY)
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def _run(
    command: list[str], given: str | None = None, seconds: float = _PATIENCE
) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", error)).splitlines()[0][:80]
