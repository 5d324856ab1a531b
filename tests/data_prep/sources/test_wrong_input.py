"""What the commands say when something is wrong: which thing, what was expected, what to do; and the exit code."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource

import pytest

from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from data_prep.sources.find import find_sources
from data_prep.sources.groups import plan_groups
from data_prep.tokenizing import piece
from tests.data_prep.writing import command, digest, documents, invoke, jsonl, run, write_jsonl
from tests.fuzz.support import processor_time

WHOLE = ("--validation", 0, "--test", 0)


def refused(*arguments, **more):
    """The one sentence on the error stream."""
    done = command(*arguments, check=False, **more)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_disk_that_takes_no_more(tmp_path, byte_bpe):
    """The kernel refuses to let any file grow past a limit, as it refuses on a full disk."""
    source = write_jsonl(tmp_path / "a.jsonl", documents(3000))
    out = tmp_path / "out"
    arguments = ("tokenize", source, "--out", out, "--tokenizer", byte_bpe, *WHOLE, "--workers")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    for workers in (1, 2):
        said = refused(*arguments, workers, preexec_fn=limit)
        assert f"writing {out} failed: File too large" in said and "run the same command again" in said
        left = [path.name for path in out.rglob("*") if path.suffix in (".bin", ".idx", ".tmp")]
        assert left == [] and not (out / "manifest.json").exists()
    command(*arguments, 1)
    run([source], tmp_path / "undisturbed", byte_bpe, validation=0, test=0)
    assert digest(out) == digest(tmp_path / "undisturbed")


def test_a_file_that_cannot_be_read(tmp_path, byte_bpe):
    """A process's memory is a regular file whose beginning no one may read, not even root."""
    folder = tmp_path / "corpus"
    for number in (0, 2):
        write_jsonl(folder / f"{number}.jsonl", documents(5, number))
    (folder / "1.jsonl").symlink_to("/proc/self/mem")
    arguments = ("tokenize", folder, "--out", tmp_path / "out", "--tokenizer", byte_bpe, *WHOLE)
    said = refused(*arguments)
    assert "1 file(s) could not be read to the end (1 unreadable_file)" in said
    assert f"{folder / '1.jsonl'}: reading failed after 0 bytes" in said and "--max-broken-files 1" in said
    (line,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert (line["file"], line["reason"]) == (str(folder / "1.jsonl"), "unreadable_file")
    accepted = command(*arguments, "--max-broken-files", 1)
    assert "train: 10 documents" in accepted.stdout and "rejected: 1 unreadable_file" in accepted.stderr


def test_no_more_rejects_are_listed_than_a_person_needs(tmp_path, byte_bpe, monkeypatch):
    monkeypatch.setattr(piece, "_LISTED", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x\n" * 1000 + jsonl(["kept"])))
    manifest = run([tmp_path / "a.jsonl.gz"], tmp_path / "out", byte_bpe, validation=0, test=0, max_rejects=1000)
    assert manifest.rejects == {"invalid_json": 1000} and manifest.splits["train"].documents == 1
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 10


def test_another_field_than_the_text(tmp_path, byte_bpe):
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(documents(5)).replace(b'"text"', b'"content"'))
    arguments = ("tokenize", source, "--out", tmp_path / "out", "--tokenizer", byte_bpe, *WHOLE)
    said = refused(*arguments)
    assert "5 of 5 documents were rejected (5 missing_field)" in said
    assert f"{source}:1: no field 'text'" in said and "--text-field" in said
    named = command(*arguments[:3], tmp_path / "other", *arguments[4:], "--text-field", "content")
    assert "train: 5 documents" in named.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format", "csv"), "--format is one of jsonl, parquet, text, wikitext, not 'csv'"),
        (("--validation", 0.6, "--test", 0.5), "leave something to train on"),
        (("--packing", "tight"), "packing must be concat or best-fit, found 'tight'"),
        (("--packing", "best-fit"), "best-fit packing needs --sequence-length"),
        (("--task-index", 4, "--task-count", 4), "--task-index 4 must be below --task-count 4"),
        (("--mpi", "--workers", 2), "leave out --workers and --task-count"),
        (("--subset", "ArXiv"), "add --subset-field"),
        (("--shuffle-seed", 2**63), "below 2**63, found 9223372036854775808"),
        (("--language", "en"), "needs both --language and --language-field"),
        (("--minimum-bytes", 9, "--maximum-bytes", 3), "maximum length 3 is below the minimum 9"),
        (("--text-field", ""), "--text-field must name a field"),
    ],
)
def test_options_that_cannot_be_right(tmp_path, byte_bpe, arguments, sentence):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(DataError, match=re.escape(sentence)):
        invoke("tokenize", source, "--out", tmp_path / "out", "--tokenizer", byte_bpe, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["{}", "web={}"])
def test_a_data_set_inside_its_corpus(tmp_path, byte_bpe, source, monkeypatch, capsys):
    corpus = tmp_path / "corpus"
    write_jsonl(corpus / "a.jsonl", ["x"])
    with pytest.raises(DataError, match=re.escape(f"--out {corpus / 'out'} is inside the source {corpus}")):
        invoke("tokenize", source.format(corpus), "--out", corpus / "out", "--tokenizer", byte_bpe)
    assert not (corpus / "out").exists()
    monkeypatch.chdir(tmp_path)
    invoke("tokenize", source.format("corpus"), "--out", "out", "--tokenizer", byte_bpe, *WHOLE)
    assert "train: 1 documents" in capsys.readouterr().out


def test_a_name_that_is_no_picture(tmp_path, byte_bpe):
    run([write_jsonl(tmp_path / "a.jsonl", documents(9))], tmp_path / "out", byte_bpe)
    for name in ("lengths", "lengths.xyz"):
        with pytest.raises(DataError, match=rf"{name}: the name of a picture ends in \.png, \.svg or \.pdf"):
            invoke("stats", tmp_path / "out", "--picture", tmp_path / name)


@pytest.mark.parametrize("arguments", [("dedup",), ("decontaminate", "--against", "{source}")])
def test_a_folder_that_cannot_be_made(tmp_path, arguments):
    source = write_jsonl(tmp_path / "a.jsonl", ["one two three four five six seven eight nine ten eleven twelve last"])
    out = tmp_path / "a.jsonl" / "out"
    name, *more = (argument.format(source=source) for argument in arguments)
    with pytest.raises(DataError, match=f"writing {out} failed: Not a directory"):
        invoke(name, source, "--out", out, *more)


def test_links_in_a_folder_are_followed_to_each_folder_once(tmp_path):
    corpus = tmp_path / "corpus"
    for here, there in ("ab", "ba"):
        write_jsonl(corpus / here / f"{here}.jsonl", ["x"])
        for number in range(3):
            (corpus / here / f"link{number}").symlink_to(corpus / there)
    write_jsonl(tmp_path / "elsewhere" / "c.jsonl", ["x"])
    write_jsonl(corpus / ".cache" / "hidden.jsonl", ["x"])
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "circle").symlink_to(corpus)
    (corpus / "outer").symlink_to(tmp_path)
    with processor_time(2.0):
        ((source,), ignored) = find_sources([str(corpus)], ReadOptions())
    assert [os.path.basename(path) for path in source.files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert ignored == []


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_a_gap(tmp_path, monkeypatch):
    """Its path is longer than the system takes, which holds for a superuser too."""
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    monkeypatch.chdir(tmp_path)
    for _ in range(18):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with pytest.raises(DataError, match=r"the folder .* cannot be listed: File name too long"):
        find_sources([str(tmp_path)], ReadOptions())


@pytest.mark.parametrize("address", ["{}", "{}/*.jsonl"])
def test_a_link_to_nothing_is_an_error_and_not_a_gap(tmp_path, address):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["x"])
    (tmp_path / "corpus" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    found, _ = find_sources([address.format(tmp_path / "corpus")], ReadOptions())
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file"):
        plan_groups(found, ReadOptions())
