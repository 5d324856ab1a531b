"""What a person at a terminal sees of the work, and how far it is said to be."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import sys
import threading
from subprocess import Popen
from types import SimpleNamespace

import pytest

from data_prep.sources.base import ReadOptions
from data_prep.tokenizing import progress
from data_prep.tokenizing.piece_schedule import Share
from data_prep.tokenizing.pipeline import tokenize
from data_prep.tokenizing.progress import Display, Estimate, expansion
from data_prep.tokenizing.shard_plan import read_plan
from tests.data_prep.writing import Quiet, compressed, documents, job, jsonl, run, write_jsonl

PIECE = 4000


class Watching(Quiet):
    """Remembers, after every batch, the estimate, and the piece it came from."""

    def begin(self, plan, schedule):
        self.estimate, self.text, self.seen = Estimate(plan, schedule), 0, []
        self.at_start = self.estimate.share(0)

    def progress(self, worker, key, progress):
        self.text += progress.text_bytes
        self.seen.append((key, self.estimate.share(self.text)))


@pytest.mark.parametrize("suffix", ["", ".zst", ".gz"])
@pytest.mark.parametrize("wanted", [[], ["a"]])
def test_the_estimate_is_near_the_share_of_the_pieces(tmp_path, byte_bpe, suffix, wanted):
    """Also where a file expands tenfold, and where nine of ten documents are filtered."""
    texts = documents(300, lines=30)
    rows = [json.dumps({"text": text, "set": "a" if n % 10 == 0 else "b"}) for n, text in enumerate(texts)]
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(compressed(("\n".join(rows) + "\n").encode(), suffix))
    options = ReadOptions(subset_field="set", subsets=tuple(wanted))
    watching = Watching()
    tokenize(job([source], tmp_path / "out", byte_bpe, options=options, piece_bytes=PIECE), watching)
    pieces = max(key[1] for key, _ in watching.seen) + 1
    assert pieces > 15 and watching.at_start == 0
    for (_, piece), share in watching.seen[5:]:
        assert abs(share - (piece + 0.5) / pieces) < 0.1
    assert watching.seen[-1][1] > 0.9


def test_an_array_task_and_a_continued_run_know_their_part(tmp_path, byte_bpe):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300, lines=30))
    work = job([source], tmp_path / "out", byte_bpe, piece_bytes=PIECE)
    for index in range(2):
        watching = Watching()
        tokenize(work, watching, share=Share(index, 2))
        assert watching.at_start == 0 and 0.9 < watching.seen[-1][1] <= 1
    again = Watching()
    again.begin(read_plan(tmp_path / "out"), watching.estimate._schedule)
    assert again.at_start > 0.9


def test_a_maximum_of_tokens_ends_the_work(tmp_path, byte_bpe):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300, lines=30))
    whole = run([source], tmp_path / "whole", byte_bpe).splits["train"].tokens
    watching = Watching()
    tokenize(job([source], tmp_path / "out", byte_bpe, piece_bytes=PIECE, max_tokens=whole // 4), watching)
    assert watching.seen[-1][1] > 0.9


def test_expansion_is_measured(tmp_path):
    data = jsonl(documents(3000))
    for suffix in (".gz", ".zst", ".xz", ".bz2"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compressed(data, suffix))
        assert abs(expansion(str(path)) - len(data) / path.stat().st_size) < 1e-9
        path.write_bytes(b"damaged")
        assert expansion(str(path)) == 1
    assert expansion("a.jsonl") == 1


def test_a_terminal_shows_bytes_documents_tokens_and_every_worker(tmp_path, byte_bpe):
    source = write_jsonl(tmp_path / "a.jsonl.zst", documents(6000))
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read():
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    process = Popen(
        [
            sys.executable, "-m", "data_prep", "tokenize", str(source), "--out", str(tmp_path / "out"),
            "--tokenizer", str(byte_bpe), "--workers", "2", "--piece-bytes", "40000",
        ],
        stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )  # fmt: skip
    assert process.wait(timeout=300) == 0
    os.close(theirs)
    reader.join(timeout=300)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode(errors="replace"))
    assert re.search(r"\d MB  [\d,]+ documents  [\d,]+ tokens/s  0:a/\d+ 1:a/\d+", text)
    assert re.search(r"\d+ % +(\d+:\d\d:\d\d|-:--:--)", text)
    assert re.search(r"6,000 documents, [\d,]+ tokens, [\d.]+ MB of text in [\d.]+ s", text)


def test_elsewhere_a_line_now_and_then_says_the_same(tmp_path, byte_bpe, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl.zst", documents(3000))
    tokenize(job([source], tmp_path / "short", byte_bpe, piece_bytes=PIECE), Display())
    assert capsys.readouterr().err == "", "a short run says nothing between"
    clock = itertools.count(0, 20)  # seconds; whoever looks finds it later
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    tokenize(job([source], tmp_path / "out", byte_bpe, piece_bytes=PIECE), Display())
    told = capsys.readouterr().err.splitlines()
    line = re.compile(
        r"(\d+\.\d)%  \d+ MB  ([\d,]+) documents  [\d,]+ tokens/s  0:a/\d+(  \d+ (s|min|h \d+ min|d \d+ h) left)?"
    )
    found = [line.fullmatch(text) for text in told]
    assert len(found) > 10 and all(found), told
    counts = [int(match[2].replace(",", "")) for match in found]
    shares = [float(match[1]) for match in found]
    assert counts == sorted(counts) and shares == sorted(shares) and 80 < shares[-1] <= 100
    assert not found[0][3] and found[-1][3]
