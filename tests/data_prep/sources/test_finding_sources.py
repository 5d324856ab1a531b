"""How the words of a command line become sources, and what a person is told about them."""

from __future__ import annotations

import io
import os
import sys

import pytest

from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from data_prep.sources.find import find_sources, with_standard_input
from data_prep.sources.notices import notices
from tests.conftest import skip_or_fail
from tests.data_prep.sources.test_sources import WIKI, items, texts
from tests.data_prep.writing import compressed, jsonl, write_jsonl


def test_names_of_sources(tmp_path, monkeypatch):
    one, two = write_jsonl(tmp_path / "a" / "one.jsonl.zst", ["x"]), write_jsonl(tmp_path / "a" / "two.json.gz", ["y"])
    names = lambda *specs: [s.name for s in find_sources(list(map(str, specs)), ReadOptions())[0]]  # noqa: E731
    assert names(one, two) == ["one", "two"]
    assert names(f"news={one}", f"law={two}", "python-docs") == ["news", "law", "python-docs"]
    assert names(tmp_path / "a") == ["a"]
    assert names(tmp_path / "a" / "*.jsonl.zst") == ["a"]
    assert names(f"both={one}", f"both={two}") == ["both"]
    assert names("hub:allenai/c4:en", "pile") == ["allenai/c4", "pile"]
    monkeypatch.chdir(tmp_path / "a")
    assert names(".") == ["a"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nowhere.jsonl"], "no file, folder or source 'nowhere.jsonl'"),
        (["a={one}", "b={folder}/./one.jsonl"], "all that 'b' names is in the source 'a' already"),
        (["a=python-docs", "b=python-docs"], "all that 'b' names is in the source 'a' already"),
        (["pile", "b=hub:monology/pile-uncopyrighted"], "all that 'b' names is in the source 'pile' already"),
        (["c4", "b=hub:allenai/c4:en:train"], "all that 'b' names is in the source 'c4' already"),
        (["hub:allenai/c4:en:train:more"], "'hub:allenai/c4:en:train:more' has too many parts"),
        (["{folder}/*.none"], r"no file matches '.*\*\.none'"),
        (["lang=none/*.jsonl"], r"no file matches 'none/\*\.jsonl'\. 'lang=none/\*\.jsonl' was taken for NAME=SOURCE"),
        (["*\0"], "no file matches"),
        (["\ud800*"], "matches"),
        (["x" * 5000], "there is no file"),
        (["a={one}", "a=python-docs"], "two sources are named 'a'"),
        (["{folder}/odd.bin"], "does not say what the file holds"),
        (["{folder}/empty"], "holds no file of a known kind"),
        (["{folder}/pipe.jsonl"], "pipe.jsonl can be read only once; .* with - as the source"),
    ],
)
def test_sources_that_cannot_be_right(tmp_path, sources, message):
    one = write_jsonl(tmp_path / "one.jsonl", ["x"])
    (tmp_path / "odd.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=message):
        find_sources([s.format(one=one, folder=tmp_path) for s in sources], ReadOptions())


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "a"}\n')
    except OSError as error:
        skip_or_fail(f"the file system of {tmp_path} takes no such names ({error})")
    with pytest.raises(DataError, match=r"caf\\udce9\.jsonl' is not UTF-8, .*rename the file"):
        find_sources([str(tmp_path)], ReadOptions())


def test_a_file_is_read_once_by_whatever_paths_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "c.jsonl", ["x"])
    write_jsonl(tmp_path / "copy" / "c.jsonl", ["x"])  # equal, and another file
    (tmp_path / "soft.jsonl").symlink_to("c.jsonl")
    os.link("c.jsonl", "hard.jsonl")
    for again in (
        "c.jsonl",
        "./c.jsonl",
        "copy/../c.jsonl",
        str(tmp_path / "c.jsonl"),
        "soft.jsonl",
        "hard.jsonl",
        "c*l",
    ):
        found, (sentence,) = find_sources(["c.jsonl", again], ReadOptions())
        assert [source.files for source in found] == [("c.jsonl",)]
        assert "given again is read once (1 left out, the first: " in sentence and "c.jsonl)" in sentence
    found, (sentence,) = find_sources(["*.jsonl", "copy", "copy/*"], ReadOptions())
    assert [source.files for source in found] == [("c.jsonl",), ("copy/c.jsonl",)]
    assert "3 left out, the first: hard.jsonl is c.jsonl" in sentence
    assert find_sources(["c.jsonl", "copy"], ReadOptions())[1] == []
    # A source of another name keeps what is its own.
    write_jsonl(tmp_path / "d.jsonl", ["y"])
    found, _ = find_sources(["one=c.jsonl", "two=[cd].jsonl"], ReadOptions())
    assert [(source.name, source.files) for source in found] == [("one", ("c.jsonl",)), ("two", ("d.jsonl",))]


def test_standard_input_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl(["in"]))))
    file = write_jsonl(tmp_path / "a.jsonl", ["x"])
    found, (sentence,) = find_sources([f"all={file}", "all=-", "-"], ReadOptions())
    assert "1 left out, the first: -" in sentence
    (source,) = with_standard_input(found, tmp_path)
    assert [text for path in source.files for text in texts(items(path))] == ["x", "in"]


@pytest.mark.parametrize("source", ["lang=en/*.jsonl", "lang=en/a.jsonl", "lang=en", "lang=e[n]/**"])
def test_a_path_with_an_equals_sign_is_itself(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "lang=en" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "en" / "a.jsonl", ["y"])
    (found,), _ = find_sources([source], ReadOptions())
    assert found.files == ("lang=en/a.jsonl",)
    (found,), _ = find_sources([f"news={source}"], ReadOptions())
    assert (found.name, found.files) == ("news", ("lang=en/a.jsonl",))
    (found,), _ = find_sources(["lang=./en/*.jsonl"], ReadOptions())
    assert (found.name, found.files) == ("lang", ("./en/a.jsonl",))


def noticed(path, **options):
    found, _ = find_sources([str(path)], ReadOptions(**options))
    return notices(found, ReadOptions(**options))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_separator_that_never_occurs_is_said(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compressed(b"one\r\n\r\ntwo\r\n\r\nthree\r\n", suffix))
    (sentence,) = noticed(path, separator="\n\n")
    assert f"the separator '\\n\\n' is not in the first 8 MB of {path}; a text file without it" in sentence
    assert r"is --separator '\r\n\r\n' meant?" in sentence
    assert len(texts(items(path, ReadOptions(separator="\r\n\r\n")))) == 3
    assert noticed(path, separator="\r\n\r\n") == []
    (sentence,) = noticed(path, separator="<|end|>")
    assert "meant?" not in sentence
    (tmp_path / "b.txt").write_text("one<|end|>two")
    assert noticed(tmp_path, separator="<|end|>") == []  # files of one document each may be among them
    assert noticed("-", separator="\n\n", format="text") == []
    (sentence,) = noticed(write_jsonl(tmp_path / "a.jsonl", ["x"]), separator="\n\n")
    assert "the separator is not used" in sentence


def test_marks_between_documents_are_said_where_the_text_is_not_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two<|endoftext|>three")
    (sentence,) = noticed(path)
    assert f"{path} holds '<|endoftext|>' 2 times or more but is read as one document" in sentence
    assert noticed(path, separator="<|endoftext|>") == []
    path.write_text("GPT-2 writes <|endoftext|> between documents.")
    assert noticed(path) == []


def test_wikitext_without_pages_is_said(tmp_path):
    (tmp_path / "wiki.raw").write_text(WIKI)
    assert noticed(tmp_path / "wiki.raw") == []
    (tmp_path / "book.raw").write_text("A text.\n\n== Heading of another kind ==\n")
    (sentence,) = noticed(tmp_path / "book.raw")
    assert "no line of" in sentence and "book.raw is the heading of a WikiText page" in sentence
