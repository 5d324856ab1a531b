"""kill -9 at random moments, of workers and of the parent: the outcome is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_prep.reading.verify import verify_dataset
from tests.data_prep.writing import digest, documents, run, write_jsonl

# So many small pieces that a run lasts seconds: what is to interrupt it must not come too late.
SETTINGS = {"validation": 0.05, "test": 0.05, "piece_bytes": 500}
OPTIONS = ("--validation", "0.05", "--test", "0.05", "--piece-bytes", "500")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl.zst", documents(1200, 11, 12))
    write_jsonl(folder / "b.jsonl", documents(1200, 12, 12))
    return folder


def command(corpus, tokenizer, out):
    return [
        sys.executable, "-m", "data_prep", "tokenize", str(corpus), "--out", str(out),
        "--tokenizer", str(tokenizer), "--workers", "2", *OPTIONS,
    ]  # fmt: skip


def start(corpus, tokenizer, out):
    return subprocess.Popen(
        command(corpus, tokenizer, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_receipts(out, count, process):
    while process.poll() is None and len(list((out / ".work").glob("piece-*.json"))) < count:
        time.sleep(0.01)


def torture(corpus, tokenizer, out, kills, seed):
    """Kill workers and the parent, `kills` times in all; then let it finish. Returns how often each was killed."""
    luck = random.Random(seed)
    met = {"worker": 0, "parent": 0}
    while sum(met.values()) < kills:
        assert not (out / "manifest.json").exists(), "there must be work left to be killed at"
        process = start(corpus, tokenizer, out)
        have = len(list((out / ".work").glob("piece-*.json")))
        wait_for_receipts(out, have + luck.randint(0, 3), process)
        time.sleep(luck.random() * 0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(_command(child))]
        if workers and luck.random() < 0.6:
            luck.choice(workers).send_signal(signal.SIGKILL)
            met["worker"] += 1
            have = len(list((out / ".work").glob("piece-*.json")))
            wait_for_receipts(out, have + luck.randint(1, 3), process)
            children = psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, process.stdout.read()
        process.kill()
        met["parent"] += 1
        process.wait(timeout=240)
        process.stdout.close()
        assert psutil.wait_procs(children, timeout=120)[1] == [], "workers end when their parent is gone"
    process = start(corpus, tokenizer, out)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return met


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_kills_change_nothing(corpus, byte_bpe, tmp_path, kills, seed):
    run([corpus], tmp_path / "undisturbed", byte_bpe, **SETTINGS)
    met = torture(corpus, byte_bpe, tmp_path / "out", kills, seed)
    assert met["worker"] and met["parent"]
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (tmp_path / "out", tmp_path / "undisturbed")]
    assert names[0] == names[1]
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
    assert verify_dataset(tmp_path / "out").problems == []


def test_ctrl_c_stops_with_one_sentence_and_the_run_continues(corpus, byte_bpe, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, byte_bpe, out)
    wait_for_receipts(out, 2, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 130 and "continues where this one was" in output and "Traceback" not in output
    assert not (out / "manifest.json").exists()
    assert list((out / ".work").glob("piece-*.json"))
    process = start(corpus, byte_bpe, out)
    assert "continuing: " in process.communicate(timeout=240)[0].decode() and process.returncode == 0


def test_a_run_goes_on_when_the_shell_that_started_it_has_ended(corpus, byte_bpe, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    line = f"{shlex.join(command(corpus, byte_bpe, out))} >{shlex.quote(str(said))} 2>&1 & echo $!"
    number = int(subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, check=True, text=True).stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(number).wait(timeout=240)
    assert (out / "manifest.json").exists(), said.read_text()
