"""Which nodes are named, and why."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pretrain.cluster.health import judge, pairings, read_reports
from pretrain.ranks.environment import clean_environment
from tests.ports import free_port


def report(**changes):
    sound = {"skew": 0.1, "gpus": 8, "gpu_names": ["H200"], "gpu_free_share": 0.99, "matmul_tflops": 700.0}
    return {**sound, "pair_gbytes": 40.0, "cores": 64, **changes}


HOSTS = ["n1", "n2", "n3", "n4"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 7}, "GPUs: 7 where the others have 8"),
        ({"gpu_names": ["A100", "H200"]}, "kinds of GPU"),
        ({"gpu_free_share": 0.5}, "50% of a GPU's memory"),
        ({"matmul_tflops": 300.0}, "matrix product at 300"),
        ({"matmul_tflops": 480.0, "peak_tflops": 989.0}, "of the 989 TFLOP/s of its GPU"),
        ({"gpus": 8, "gpus_given": 9}, "Slurm gave it 9 GPUs and torch sees 8"),
        ({"pair_gbytes": 5.0}, "all-reduce at 5"),
        ({"skew": 90.0}, "clock is +90 s off"),
        ({"error": "RuntimeError: NCCL"}, "NCCL"),
    ],
)
def test_the_odd_one_out_is_named(changes, words):
    problems = judge({**{host: report() for host in HOSTS}, "n3": report(**changes)}, HOSTS)
    assert list(problems) == ["n3"]
    assert words in problems["n3"]


@pytest.mark.parametrize("changes", [{"matmul_tflops": 400.0}, {"pair_gbytes": 20.0}, {"skew": 90.0}, {"skew": -9.0}])
def test_of_two_nodes_the_worse_is_named(changes):
    assert list(judge({"n1": report(), "n2": report(**changes)}, HOSTS[:2])) == ["n2"]


def test_nodes_that_are_alike_are_fit_unless_all_are_slow():
    assert judge({host: report(matmul_tflops=690.0 + 5 * i) for i, host in enumerate(HOSTS)}, HOSTS) == {}
    slow = {host: report(matmul_tflops=200.0, peak_tflops=989.0) for host in HOSTS}
    assert list(judge(slow, HOSTS)) == HOSTS


@pytest.mark.parametrize("nodes", range(2, 9))
def test_every_node_is_paired_with_its_neighbours(nodes):
    turns = pairings(nodes)
    for turn in turns:
        members = [node for pair in turn for node in pair]
        assert len(members) == len(set(members)), "a node cannot do two all-reduces at once"
    ring = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)}
    pairs = [frozenset(pair) for turn in turns for pair in turn]
    assert set(pairs) == ring and len(pairs) == len(ring)


SLOW_LINK = """
import json, os, sys, time
import torch.distributed as dist
from pretrain.cluster.health import all_reduce_speeds
rank, nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
really = dist.all_reduce
def slowly(*arguments, **named):
    time.sleep(0.3)
    return really(*arguments, **named)
if rank == 1:
    dist.all_reduce = slowly
print(json.dumps(all_reduce_speeds(rank, nodes, gpu=False, size=2**16)))
"""


def test_a_slow_link_shows_only_at_its_own_node():
    port = str(free_port())
    meeting = {**clean_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "4"}
    command = [sys.executable, "-c", SLOW_LINK]
    environs = [{**meeting, "RANK": str(rank)} for rank in range(4)]
    nodes = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for environ in environs]
    speeds = [json.loads(node.communicate(timeout=200)[0].splitlines()[-1]) for node in nodes]
    # Half the time that the slow node takes: another begins to wait a little after it, and is no faster for that.
    slowest = 2**16 / 0.15 / 1e9
    assert [speed["pair_gbytes"] <= slowest for speed in speeds] == [False, True, False, False], speeds
    # With all nodes together everybody waits for the slow one.
    assert all(speed["reduce_gbytes"] <= slowest for speed in speeds), speeds
    found = judge({host: report(**speed) for host, speed in zip(HOSTS, speeds)}, HOSTS)
    assert "all-reduce at" in found["n2"]


def test_a_node_that_says_nothing_is_named():
    problems = judge({host: report() for host in HOSTS[:3]}, HOSTS)
    assert list(problems) == ["n4"] and "wrote no report" in problems["n4"]


@pytest.mark.parametrize(("accelerator", "given"), [(None, 99), ("cpu", 0)])
def test_this_machine_examines_itself(tmp_path, accelerator, given):
    environ = {**clean_environment(), "SLURMD_NODENAME": "here", "SLURM_GPUS_ON_NODE": "99"}
    environ.pop("DS_ACCELERATOR", None)
    environ |= {"DS_ACCELERATOR": accelerator} if accelerator else {}
    subprocess.run([sys.executable, "-m", "pretrain.cluster.health", "alone", str(tmp_path)], env=environ, check=True)
    found = read_reports(tmp_path)["here"]
    assert found["matmul_tflops"] > 0 and abs(found["skew"]) < 5 and "error" not in found
    assert found["gpus_given"] == given
