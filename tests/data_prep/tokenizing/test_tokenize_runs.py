"""`tokenize` by many workers or tasks, stopped and continued, writes the bytes of one process that nothing disturbs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from data_prep.tokenizing.piece_schedule import Share
from data_prep.tokenizing.pipeline import merge_tasks, tokenize
from tests.data_prep.sources.test_sources import BAD_LINES
from tests.data_prep.tokenizing.test_tokenize import PIECE, written
from tests.data_prep.writing import Quiet, compressed, digest, documents, job, jsonl, run, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Several files of several kinds, with rejects in them."""
    folder = tmp_path_factory.mktemp("corpus")
    bad = b"\n".join(BAD_LINES.values()) + b"\n"
    texts = documents(600, 7)
    (folder / "a.jsonl").write_bytes(jsonl(texts[:200]) + bad + jsonl(texts[200:260]))
    (folder / "b.jsonl.zst").write_bytes(compressed(jsonl(texts[260:400]) + bad + jsonl(texts[400:500]), ".zst"))
    for number in range(10):
        write_jsonl(folder / f"c{number}.jsonl.gz", texts[500 + 10 * number : 510 + 10 * number])
    return folder


SETTINGS = {"validation": 0.05, "test": 0.05, "piece_bytes": PIECE, "max_rejects": 100}


@pytest.fixture(scope="module")
def undisturbed(corpus, byte_bpe, tmp_path_factory):
    """The corpus, tokenized by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run([corpus], out, byte_bpe, **SETTINGS)
    return out


def test_three_workers_write_the_same_bytes(corpus, byte_bpe, undisturbed, tmp_path):
    run([corpus], tmp_path / "out", byte_bpe, workers=3, **SETTINGS)
    assert digest(tmp_path / "out") == digest(undisturbed)
    assert read_manifest(tmp_path / "out").digest() == read_manifest(undisturbed).digest()


@pytest.mark.parametrize("count", [2, 8])
def test_array_tasks_in_any_order_write_the_same_bytes(corpus, byte_bpe, undisturbed, tmp_path, count):
    out = tmp_path / "out"
    work = job([corpus], out, byte_bpe, **SETTINGS)
    for index in reversed(range(count)):
        with pytest.raises(DataError, match=r"pieces are missing|holds no unfinished"):
            merge_tasks(out)
        assert tokenize(work, Quiet(), share=Share(index, count)) is None
    merge_tasks(out, max_rejects=100)
    assert digest(out) == digest(undisturbed)
    assert read_manifest(out).digest() == read_manifest(undisturbed).digest()


def test_rejects_are_listed_with_the_line_of_the_file(corpus, undisturbed):
    found = [json.loads(line) for line in (undisturbed / "rejects.jsonl").read_text().splitlines()]
    wanted = []
    for name, first in (("a.jsonl", 201), ("b.jsonl.zst", 141)):
        wanted += [(str(corpus / name), first + n, reason) for n, reason in enumerate(BAD_LINES)]
    assert [(line["file"], line["line"], line["reason"]) for line in found] == wanted
    assert all(line["detail"] for line in found)
    assert read_manifest(undisturbed).rejects == dict.fromkeys(sorted(BAD_LINES), 2)


def test_too_many_rejects_stop_the_data_set_and_a_higher_limit_finishes_it(corpus, byte_bpe, undisturbed, tmp_path):
    out = tmp_path / "out"
    few = {**SETTINGS, "max_rejects": 0.01}
    with pytest.raises(DataError, match=r"12 of 612 documents were rejected .*--max-rejects 0.01"):
        run([corpus], out, byte_bpe, **few)
    assert not (out / "manifest.json").exists()
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 12
    listener = Quiet()
    tokenize(job([corpus], out, byte_bpe, **{**SETTINGS, "max_rejects": 0.05}), listener)
    assert listener.steps == 0, "nothing is done twice"
    assert digest(out) == digest(undisturbed)


def test_a_finished_data_set_is_left_alone(corpus, byte_bpe, undisturbed):
    before = (undisturbed / "manifest.json").read_bytes()
    listener = Quiet()
    tokenize(job([corpus], undisturbed, byte_bpe, **SETTINGS), listener)
    assert listener.steps == 0 and "nothing to do" in listener.said[0]
    assert (undisturbed / "manifest.json").read_bytes() == before
    with pytest.raises(DataError, match=r"other settings \(validation: 0.05 -> 0.06\)"):
        run([corpus], undisturbed, byte_bpe, **{**SETTINGS, "validation": 0.06})


def test_a_stopped_run_does_only_what_is_missing(corpus, byte_bpe, undisturbed, tmp_path):
    out = tmp_path / "out"

    class Stopping(Quiet):
        def progress(self, *arguments):
            super().progress(*arguments)
            if self.steps == 30:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(job([corpus], out, byte_bpe, **SETTINGS), Stopping())
    receipts = len(list((out / ".work").glob("piece-*.json")))
    assert receipts > 3 and not (out / "manifest.json").exists()
    listener = Quiet()
    tokenize(job([corpus], out, byte_bpe, **SETTINGS), listener)
    assert listener.found == receipts
    assert digest(out) == digest(undisturbed)


def test_an_unfinished_run_of_other_settings_or_changed_files_is_not_continued(corpus, byte_bpe, tmp_path):
    out = tmp_path / "out"
    tokenize(job([corpus], out, byte_bpe, **SETTINGS), Quiet(), share=Share(0, 4))
    with pytest.raises(DataError, match=r"unfinished data set of other settings .*split_seed: 0 -> 1"):
        run([corpus], out, byte_bpe, **{**SETTINGS, "split_seed": 1})
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(jsonl(documents(100)))
    tokenize(job([copy], tmp_path / "b", byte_bpe, **SETTINGS), Quiet(), share=Share(0, 2))
    copy.write_bytes(jsonl(documents(101)))
    with pytest.raises(DataError, match="other settings"):
        tokenize(job([copy], tmp_path / "b", byte_bpe, **SETTINGS), Quiet(), share=Share(1, 2))


def test_two_runs_do_not_write_the_same_folder(corpus, byte_bpe, tmp_path):
    out = tmp_path / "out"
    second = "import sys\nfrom pathlib import Path\nfrom data_prep.tokenizing.pipeline import only_writer\n"
    second += "with only_writer(Path(sys.argv[1]), ''): pass"

    class Second(Quiet):
        def begin(self, plan, schedule):
            done = subprocess.run([sys.executable, "-c", second, str(out)], capture_output=True, text=True)
            assert "another process is writing" in done.stderr
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(job([corpus], out, byte_bpe, **SETTINGS), Second())


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_file_that_breaks_off_stops_the_data_set_until_it_is_repaired(tmp_path, byte_bpe, suffix):
    texts = documents(300)
    whole = write_jsonl(tmp_path / f"a.jsonl{suffix}", texts).read_bytes()
    source, out = tmp_path / f"b.jsonl{suffix}", tmp_path / "out"
    source.write_bytes(whole[:-30] + bytes(30))
    with pytest.raises(DataError, match=r"1 file.* could not be read to the end .*broken_compression"):
        run([source], out, byte_bpe, piece_bytes=PIECE)
    (line,) = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert line["file"] == str(source) and line["reason"] == "broken_compression"
    assert line["line"] > 200 or suffix == ".zst"  # where one damaged block may be the whole file
    assert not (out / "manifest.json").exists()
    source.write_bytes(whole)
    manifest = run([source], out, byte_bpe, piece_bytes=PIECE)
    assert sum(split.documents for split in manifest.splits.values()) == 300
    assert not (out / "rejects.jsonl").exists()


def test_a_broken_file_can_be_accepted_and_gives_the_same_for_any_number_of_workers(tmp_path, byte_bpe):
    whole = bytearray(write_jsonl(tmp_path / "a.jsonl.gz", documents(400)).read_bytes())
    whole[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    source = tmp_path / "b.jsonl.gz"
    source.write_bytes(whole)
    for workers in (1, 3):
        manifest = run([source], tmp_path / str(workers), byte_bpe, workers=workers, piece_bytes=PIECE, max_broken=1)
        assert manifest.rejects["broken_compression"] == 1
        assert 100 < sum(split.documents for split in manifest.splits.values()) < 400
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


@pytest.mark.parametrize("limit", [1, 700, 5000, 10**9])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_maximum_of_tokens_is_kept_in_the_order_of_the_sources(
    corpus, byte_bpe, undisturbed, tmp_path, limit, workers
):
    out = tmp_path / "out"
    manifest = run([corpus], out, byte_bpe, workers=workers, max_tokens=limit, **SETTINGS)
    wanted, total = [], 0
    for document in written(undisturbed, "train"):
        if total + len(document) > limit:
            break
        wanted.append(document)
        total += len(document)
    assert written(out, "train") == wanted
    named = {shard.name for split in manifest.splits.values() for shard in split.shards}
    assert {path.stem for path in out.glob("*.bin")} == named
    assert verify_dataset(out).problems == []
