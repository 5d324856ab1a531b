"""Hub data sets by streaming, against a server on this machine; a broken connection is taken up where it broke."""

from __future__ import annotations

import io
import json
import zlib
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.reading.manifest import read_manifest
from data_prep.sources import hub
from data_prep.sources.base import Document, Group, ReadOptions
from tests.data_prep.sources.hub_server import COMMIT, Hub, serve
from tests.data_prep.sources.test_sources import WIKI
from tests.data_prep.tokenizing.test_tokenize import encoder, written
from tests.data_prep.writing import command, compressed, documents, jsonl, run

TEXTS = documents(120)


def tokenized(address, out, tokenizer, source, *more, check=True):
    """`tokenize` of a source of the hub at `address`, all of it for training."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(out.parent / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    arguments = (source, "--out", out, "--tokenizer", tokenizer, "--validation", 0, "--test", 0, "--workers", 1, *more)
    return command("tokenize", *arguments, check=check, environment=environment)


def json_files():
    files = {f"en/c4-train.0000{n}-of-00003.json.gz": TEXTS[40 * n : 40 * n + 40] for n in range(3)}
    readme = "---\nconfigs:\n- config_name: en\n  data_files: en/*.json.gz\n---\n"
    return {"README.md": readme.encode(), **{name: compressed(jsonl(t), ".gz") for name, t in files.items()}}


def parquet_files():
    files = {}
    for number in range(2):
        buffer = io.BytesIO()
        rows = [{"text": text, "score": 1} for text in TEXTS[60 * number : 60 * number + 60]]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=20)
        files[f"data/train-0000{number}-of-00002.parquet"] = buffer.getvalue()
    return files


@pytest.mark.parametrize(
    ("source", "repository", "files", "name"),
    [
        ("c4", "allenai/c4", json_files, "c4"),
        ("hub:Skylion007/openwebtext", "Skylion007/openwebtext", parquet_files, "Skylion007/openwebtext"),
    ],
)
def test_a_stream_that_breaks_gives_every_document_once(tmp_path, byte_bpe, source, repository, files, name):
    server = Hub(repository, files())
    server.breaks, server.break_after, server.busy = 2, 1500, 2
    out = tmp_path / "out"
    with serve(server) as address:
        tokenized(address, out, byte_bpe, source)
    assert server.seen["broken"] == 2 and server.seen["busy"] == 2
    assert written(out, "train") == [encoder(byte_bpe)(text) for text in TEXTS]
    manifest = read_manifest(out)
    assert [entry["name"] for entry in manifest.sources] == [name]
    assert manifest.statistics["hub_revisions"] == {repository: COMMIT}
    assert len(manifest.splits["train"].shards) == len([f for f in files() if not f.endswith(".md")])


def test_a_subset_of_the_pile(tmp_path, byte_bpe):
    rows = [
        json.dumps({"text": text, "meta": {"pile_set_name": ["ArXiv", "Books3"][number % 2]}})
        for number, text in enumerate(TEXTS)
    ]
    parts = {"train/00": rows[:70], "train/01": rows[70:], "val": rows, "test": rows}
    server = Hub(
        "monology/pile-uncopyrighted",
        {f"{name}.jsonl.zst": compressed("\n".join(lines).encode(), ".zst") for name, lines in parts.items()},
    )
    with serve(server) as address:
        chosen = ("--subset-field", "meta.pile_set_name", "--subset", "Books3")
        tokenized(address, tmp_path / "out", byte_bpe, "pile", *chosen)
    assert written(tmp_path / "out", "train") == [encoder(byte_bpe)(text) for text in TEXTS[1::2]]
    assert [entry["name"] for entry in read_manifest(tmp_path / "out").sources] == ["Books3"]


def wikitext_files():
    """As on the hub: a row is a line of the raw file, and an empty line is an empty string."""
    lines = [line if line.strip() else "" for line in WIKI.splitlines(keepends=True)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), buffer)
    readme = "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files: wikitext-103-raw-v1/*.parquet\n---\n"
    return {"README.md": readme.encode(), "wikitext-103-raw-v1/train-00000-of-00001.parquet": buffer.getvalue()}


def test_the_lines_of_wikitext_become_its_articles(tmp_path, byte_bpe):
    with serve(Hub("Salesforce/wikitext", wikitext_files())) as address:
        tokenized(address, tmp_path / "out", byte_bpe, "wikitext-103")
    (tmp_path / "wiki.raw").write_text(WIKI)
    run([tmp_path / "wiki.raw"], tmp_path / "raw", byte_bpe, validation=0, test=0)
    assert len(written(tmp_path / "out", "train")) == 2
    assert written(tmp_path / "out", "train") == written(tmp_path / "raw", "train")


def test_an_unknown_data_set_is_named(tmp_path, byte_bpe):
    with serve(Hub("some/other", {"a.jsonl": b""})) as address:
        failed = tokenized(address, tmp_path / "out", byte_bpe, "hub:no/such", check=False)
    assert failed.returncode == 2 and "hub data set 'no/such' cannot be opened" in failed.stderr


class Broken:
    """What `datasets` gives: rows that can be skipped; an error in front of row number `fail_at`."""

    def __init__(self, rows, fail_at, error):
        self.rows, self.fail_at, self.error = rows, fail_at, error

    def shard(self, num_shards, index):
        return self

    def skip(self, count):
        return Broken(self.rows[count:], self.fail_at, self.error)

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.fail_at:
                raise self.error
            yield row


def read(monkeypatch, failures, error, sleep=lambda seconds: None):
    rows = [{"text": text} for text in TEXTS[:20]]
    streams = iter(failures)

    monkeypatch.setattr(hub, "_load", lambda *_: Broken(rows, next(streams, None), error))
    monkeypatch.setattr(hub.time, "sleep", sleep)
    extra = {"repository": "a/b", "revision": "c", "config": "", "split": "train", "files": 1, "file": 0}
    reader = hub.HubReader(Group(0, "b", "hub", (), 0, 1, 1, extra), ReadOptions())
    return [item.text if isinstance(item, Document) else item for item in reader.items(0)]


def test_the_reader_goes_on_behind_the_last_row(monkeypatch):
    assert read(monkeypatch, [5, 3, 0, 0, 7], ConnectionError("reset")) == TEXTS[:20]


@pytest.mark.parametrize("error", [ConnectionError("reset"), zlib.error("reset"), zstandard.ZstdError("reset")])
def test_a_stream_that_fails_again_and_again_is_given_up(monkeypatch, error):
    *found, reject = read(monkeypatch, [4, 0, 0, 0, 0, 0], error)
    assert found == TEXTS[:4] and reject.reason == "unreadable_file"
    assert f"failed 5 times after row 4: {type(error).__name__}: reset" in reject.detail


def test_a_run_that_is_continued_stays_at_the_commit_it_began_with(tmp_path, byte_bpe):
    server = Hub("allenai/c4", json_files())
    with serve(server) as address:
        tokenized(address, tmp_path / "out", byte_bpe, "c4", "--task-index", 0, "--task-count", 2)
        server.push("f" * 40, {name: data for name, data in json_files().items() if "00002" not in name})
        tokenized(address, tmp_path / "out", byte_bpe, "c4", "--task-index", 1, "--task-count", 2)
        command("merge", tmp_path / "out")
        tokenized(address, tmp_path / "new", byte_bpe, "c4")
    assert written(tmp_path / "out", "train") == [encoder(byte_bpe)(text) for text in TEXTS]
    assert read_manifest(tmp_path / "out").statistics["hub_revisions"] == {"allenai/c4": COMMIT}
    assert written(tmp_path / "new", "train") == [encoder(byte_bpe)(text) for text in TEXTS[:80]]


class Refused(Exception):
    """As the hub's client raises it, below what `datasets` makes of it."""

    def __init__(self, status, headers):
        super().__init__(f"{status} for url")
        self.response = SimpleNamespace(status_code=status, headers=headers)


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"Retry-After": "77"}, [77, 77]),
        (429, {"RateLimit": '"api";r=0;t=213'}, [213, 213]),
        (503, {"Retry-After": "99999"}, [600, 600]),
        (500, {"Retry-After": "5"}, [1, 2]),
    ],
)
def test_it_waits_as_long_as_the_hub_asks(monkeypatch, status, headers, waits):
    error = ConnectionError("wrapped")
    error.__cause__ = Refused(status, headers)
    slept = []
    assert read(monkeypatch, [6, 0], error, slept.append) == TEXTS[:20]
    assert slept == waits
