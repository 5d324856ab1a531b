"""Which nodes are named, and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pretrain.cluster.health import judge, read_reports
from pretrain.environment import clean_environment


def report(**changes):
    sound = {"skew": 0.1, "gpus": 8, "gpu_names": ["H200"], "gpu_free_share": 0.99, "matmul_tflops": 700.0}
    return {**sound, "reduce_gbytes": 40.0, "cores": 64, **changes}


HOSTS = ["n1", "n2", "n3", "n4"]


def test_equal_nodes_are_sound():
    assert judge({host: report(matmul_tflops=690.0 + 5 * i) for i, host in enumerate(HOSTS)}, HOSTS) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 7}, "GPUs: 7 where the others have 8"),
        ({"gpu_names": ["A100", "H200"]}, "kinds of GPU"),
        ({"gpu_free_share": 0.5}, "50% of a GPU's memory"),
        ({"matmul_tflops": 300.0}, "matrix product at 300"),
        ({"reduce_gbytes": 5.0}, "all-reduce at 5"),
        ({"skew": 90.0}, "clock is +90 s off"),
        ({"error": "RuntimeError: NCCL"}, "NCCL"),
    ],
)
def test_the_odd_one_out_is_named(changes, words):
    problems = judge({**{host: report() for host in HOSTS}, "n3": report(**changes)}, HOSTS)
    assert list(problems) == ["n3"]
    assert words in problems["n3"]


def test_a_node_that_says_nothing_is_named():
    problems = judge({host: report() for host in HOSTS[:3]}, HOSTS)
    assert list(problems) == ["n4"] and "wrote no report" in problems["n4"]


def test_this_machine_examines_itself(tmp_path):
    environ = {**clean_environment(), "SLURMD_NODENAME": "here"}
    subprocess.run([sys.executable, "-m", "pretrain.cluster.health", "alone", str(tmp_path)], env=environ, check=True)
    found = read_reports(tmp_path)["here"]
    assert found["matmul_tflops"] > 0 and abs(found["skew"]) < 5 and "error" not in found
