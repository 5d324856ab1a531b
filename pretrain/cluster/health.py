"""Are these nodes fit to train together? Each writes a report into a shared folder, and those that differ are named.

A report holds: the GPUs that torch sees, their free memory, the speed of a matrix product, the node's clock minus the
file server's, and the speed of all-reduces, with all nodes and with each neighbour alone. A node without a report is
gone, or does not see the shared file system.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_json

if TYPE_CHECKING:
    from pretrain.cluster.slurm_job import Job

_SLOWEST = 0.6  # of the median speed
_LEAST_OF_PEAK = 0.5  # of the vendor's figure; a healthy GPU's matrix product reaches about 80 %
_LEAST_FREE = 0.9  # of a GPU's memory
_LARGEST_SKEW = 5.0  # seconds
# A node that fails must not end the examination of the others.
_OPTIONS = ["--time=5", "--kill-on-bad-exit=0"]
# Each node alone first: an all-reduce with a broken node fails on the others too.
_KINDS = ("alone", "together")


def check_nodes(job: Job) -> dict[str, str]:
    """Examine the nodes of a job from its first node; returns what is wrong, by host."""
    folder = Path.cwd() / f".health-{job.identity}-{job.restarts}"
    folder.mkdir()
    try:
        for kind in _KINDS:
            command = job.inside([job.python, "-m", "pretrain.cluster.health", kind, str(folder)])
            job.step(command, per_node=1, options=_OPTIONS)
            if bad := judge(read_reports(folder), job.hosts):
                return bad
        return {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def examine_cluster(
    folder: Path, options: Sequence[str], nodes: int, environ: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Examine `nodes` nodes by jobs with these options of srun; returns the reports by host, and what srun printed."""
    folder.mkdir(parents=True)
    said = ""
    for kind in _KINDS:
        command = ["srun", "--ntasks-per-node=1", *_OPTIONS, *options]
        command += [sys.executable, "-m", "pretrain.cluster.health", kind, str(folder)]
        said = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True).stderr
        reports = read_reports(folder)
        if len(reports) < nodes or judge(reports, list(reports)):
            break
    return reports, said


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """The nodes' reports, by host name as Slurm knows it."""
    reports = {}
    for file in folder.glob("*.json"):
        with contextlib.suppress(ValueError):
            reports[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return reports


def judge(reports: dict[str, dict[str, Any]], hosts: list[str]) -> dict[str, str]:
    """What is wrong, by host: no report, or a report that differs from most of the others."""
    missing = f"wrote no report: it does not answer, or does not see {Path.cwd()}"
    problems: dict[str, list[str]] = {host: [] if host in reports else [missing] for host in hosts}
    here = {host: report for host, report in reports.items() if host in problems}
    for key, name in (("gpus", "GPUs"), ("gpu_names", "kinds of GPU")):
        found = [json.dumps(report[key]) for report in here.values()]
        usual = statistics.mode(found) if found else ""
        for host, report in here.items():
            if json.dumps(report[key]) != usual:
                problems[host].append(f"{name}: {json.dumps(report[key])} where the others have {usual}")
    # Every node is as slow as the slowest in an all-reduce of all nodes, so that one is not compared.
    for key, name, unit in (("matmul_tflops", "matrix product", "TFLOP/s"), ("pair_gbytes", "all-reduce", "GB/s")):
        speeds = {host: report[key] for host, report in here.items() if report.get(key)}
        usual_speed = statistics.median_high(speeds.values()) if speeds else 0.0
        for host, speed in speeds.items():
            if speed < _SLOWEST * usual_speed:
                problems[host].append(f"{name} at {speed:.3g} {unit} where the others reach {usual_speed:.3g}")
    skews = [report["skew"] for report in here.values()]
    # The file server's clock may be the wrong one, so the median decides; of two nodes, the one nearer to the server.
    middle = min(statistics.median_low(skews), statistics.median_high(skews), key=abs) if skews else 0.0
    for host, report in here.items():
        if report.get("error"):
            problems[host].append(report["error"])
        if report["gpus"] < report.get("gpus_given", 0):
            problems[host].append(f"Slurm gave it {report['gpus_given']} GPUs and torch sees {report['gpus']}")
        reached, promised = report.get("matmul_tflops", math.inf), report.get("peak_tflops", 0.0)
        if reached < _LEAST_OF_PEAK * promised:
            problems[host].append(f"matrix product at {reached:.3g} of the {promised:.3g} TFLOP/s of its GPU")
        if abs(report["skew"] - middle) > _LARGEST_SKEW:
            problems[host].append(f"its clock is {report['skew'] - middle:+.0f} s off")
        if report.get("gpu_free_share", 1.0) < _LEAST_FREE:
            free = f"only {report['gpu_free_share']:.0%} of a GPU's memory is free"
            problems[host].append(f"{free}: another process uses it")
    return {host: "; ".join(found) for host, found in problems.items() if found}


def examine(kind: str, folder: Path) -> None:
    """Examine this node `alone`, or its all-reduce `together` with the others, and write FOLDER/<host>.json."""
    from pretrain.ranks.environment import prepare_environment

    # Read before prepare_environment, which sets DS_ACCELERATOR=cpu if there is no GPU.
    wants_gpus = os.environ.get("DS_ACCELERATOR") != "cpu"
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) if wants_gpus else 0
    ranks = prepare_environment()
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = _alone(folder, host) | {"gpus_given": given} if kind == "alone" else read_reports(folder)[host]
    if kind == "together" and ranks.world_size > 1:
        report["meeting"] = f"{ranks.launcher}, {ranks.master_address}:{ranks.master_port}"
        try:
            report |= all_reduce_speeds(ranks.rank, ranks.world_size, gpu=bool(report["gpus"]))
        except Exception as error:  # torch raises several kinds
            report["error"] = f"all-reduce: {_first_line(error)}"
    write_json(folder / f"{host}.json", report)


def all_reduce_speeds(rank: int, nodes: int, *, gpu: bool, size: int = 64 * 2**20) -> dict[str, float]:
    """Size of a buffer divided by the time of its all-reduce, the best of three, in 1e9 bytes a second. (A ring moves
    2 (p - 1) / p times the buffer in and out of each of p nodes.)

    Args:
        rank, nodes: this node's number and the number of nodes; the process group's variables are set.
        gpu: whether the buffer of `size` bytes is on the first GPU (NCCL) or in memory (gloo).

    Returns:
        `reduce_gbytes` with all nodes; `pair_gbytes`, the better of those with the nodes before and after this one,
        which is low only if this node is slow, or both its neighbours are.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(seconds=120))
    try:
        buffer = torch.ones(size // 4, device="cuda" if gpu else "cpu")

        def speed(group: dist.ProcessGroup | None) -> float:
            best = math.inf
            for _ in range(4):  # the first one connects
                dist.barrier(group)
                start = time.perf_counter()
                dist.all_reduce(buffer, group=group)
                if gpu:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
            return size / best / 1e9

        everybody = speed(None)
        pairs = []
        for turn in pairings(nodes):
            # Every node makes every group, in the same order.
            groups = [(pair, dist.new_group(list(pair))) for pair in turn]
            pairs += [speed(group) for pair, group in groups if rank in pair]
            dist.barrier()
        return {"reduce_gbytes": everybody, "pair_gbytes": max(pairs)}
    finally:
        dist.destroy_process_group()


def pairings(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring of nodes, in turns of pairs that have no node in common."""
    ring = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else 1)]
    odd = ring[-1:] if nodes % 2 and nodes > 1 else []
    paired = ring[: len(ring) - len(odd)]
    return [turn for turn in (paired[0::2], paired[1::2], odd) if turn]


def _alone(folder: Path, host: str) -> dict[str, Any]:
    import torch

    probe = folder / f".{host}.clock"
    probe.touch()
    report: dict[str, Any] = {"host": host, "cores": os.cpu_count(), "skew": time.time() - probe.stat().st_mtime}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    report |= {"gpus": gpus, "gpu_names": sorted({torch.cuda.get_device_name(index) for index in range(gpus)})}
    devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
    try:
        if gpus:
            memory = [torch.cuda.mem_get_info(index) for index in range(gpus)]
            report["gpu_free_share"] = min(free / total for free, total in memory)
            from pretrain.training.engine import peak_flops

            report["peak_tflops"] = (peak_flops(devices[0]) or 0.0) / 1e12
        report["matmul_tflops"] = min(_matmul_tflops(device) for device in devices)
    except Exception as error:  # any failure belongs into the report
        report["error"] = _first_line(error)
    return report


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _matmul_tflops(device: Any) -> float:
    import torch

    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


if __name__ == "__main__":
    examine(sys.argv[1], Path(sys.argv[2]))
