"""What every kind of source yields, what is rejected, and how files become groups."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from codecs import BOM_UTF8
from contextlib import closing

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.errors import DataError
from data_prep.sources import base
from data_prep.sources import lines as lines_module
from data_prep.sources import text as text_module
from data_prep.sources.base import Document, Filtered, Group, ReadOptions, Reject
from data_prep.sources.find import find_sources
from data_prep.sources.groups import plan_groups, reader_for
from tests.data_prep.writing import compressed, documents, jsonl, write_jsonl


def items(path, options=None, piece_bytes=0):
    """All items of one source, piece after piece, by one reader per group."""
    options = options or ReadOptions()
    found, _ = find_sources([str(path)], options)
    result = []
    for group in plan_groups(found, options, piece_bytes):
        with closing(reader_for(group, options)) as reader:
            result += reader.all_items()
    return result


def texts(found):
    return [item.text for item in found if isinstance(item, Document)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("piece_bytes", [0, 700])
def test_json_lines_of_every_compression(tmp_path, suffix, piece_bytes):
    wanted = documents(40)
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", wanted)
    assert texts(items(path, piece_bytes=piece_bytes)) == wanted


@pytest.mark.parametrize("piece_bytes", [0, 300])
def test_a_byte_order_mark_costs_no_document(tmp_path, piece_bytes):
    wanted = ["first", *documents(20), "joined"]
    data = BOM_UTF8 + jsonl(wanted[:-1]) + BOM_UTF8 + jsonl(wanted[-1:])
    (tmp_path / "a.jsonl").write_bytes(data)
    assert texts(items(tmp_path / "a.jsonl", piece_bytes=piece_bytes)) == wanted


BAD_LINES = {
    "invalid_json": b'{"text": "cut of',
    "invalid_utf8": b'{"text": "\xff\xfe"}',
    "missing_field": b'{"body": "x"}',
    "wrong_type": b'{"text": ["x"]}',
    "empty_document": b'{"text": " \\n\\t "}',
    "nul_byte": b'{"text": "a\\u0000b"}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_rejected_with_its_number(tmp_path, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one", "two"]) + BAD_LINES[reason] + b"\n" + jsonl(["three"]))
    found = items(path)
    assert texts(found) == ["one", "two", "three"]
    (reject,) = [item for item in found if isinstance(item, Reject)]
    assert (reject.reason, reject.line) == (reason, 3)


def test_other_json_values_and_null_texts_are_rejected(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'[1]\n"x"\n{"text": null}\n\n{"text": "good"}')  # a last line without a newline counts
    found = items(path)
    assert [item.reason for item in found if isinstance(item, Reject)] == ["invalid_json"] * 2 + ["missing_field"]
    assert [item for item in found if isinstance(item, Filtered)] == [Filtered("blank_line")]
    assert texts(found) == ["good"]


def test_pile_subsets_and_languages_are_chosen_by_field(tmp_path):
    lines = [
        {"text": "mail", "meta": {"pile_set_name": "Enron Emails"}, "lang": "en"},
        {"text": "law", "meta": {"pile_set_name": "FreeLaw"}, "lang": "en"},
        {"text": "recht", "meta": {"pile_set_name": "FreeLaw"}, "lang": "de"},
        {"text": "nowhere", "meta": {}, "lang": "en"},
    ]
    path = tmp_path / "00.jsonl.zst"
    path.write_bytes(compressed("\n".join(map(json.dumps, lines)).encode(), ".zst"))
    options = ReadOptions(
        subset_field="meta.pile_set_name", subsets=("FreeLaw",), language_field="lang", languages=("en",)
    )
    found = items(path, options)
    assert [(item.text, item.subset) for item in found if isinstance(item, Document)] == [("law", "FreeLaw")]
    assert [item.reason for item in found if isinstance(item, Filtered)] == ["subset", "language"]
    assert [item.reason for item in found if isinstance(item, Reject)] == ["missing_field"]


def parquet(path, rows, row_group_size=7):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("piece_bytes", [0, 2000])
def test_parquet_rows(tmp_path, piece_bytes):
    wanted = documents(40)
    rows = [{"text": text, "score": 0.5, "nested": {"lang": "en"}} for text in wanted]
    rows[3]["text"] = None
    rows[4]["nested"]["lang"] = "de"
    path = parquet(tmp_path / "a.parquet", rows)
    options = ReadOptions(language_field="nested.lang", languages=("en",))
    found = items(path, options, piece_bytes)
    assert texts(found) == wanted[:3] + wanted[5:]
    assert [item.reason for item in found if isinstance(item, Reject)] == ["missing_field"]


def test_parquet_without_the_column_says_which_columns_there_are(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"content": "x", "id": 1}])
    with pytest.raises(DataError, match="no column 'text'; it has content, id"):
        items(path)


def test_columns_of_a_flattened_table_have_dots_in_their_names(tmp_path):
    rows = [{"doc.text": text, "meta.name": "a"} for text in documents(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    options = ReadOptions(text_field="doc.text", subset_field="meta.name")
    found = items(tmp_path / "a.parquet", options)
    assert texts(found) == documents(5) and {item.subset for item in found} == {"a"}


def test_a_damaged_parquet_file_is_a_reject_among_others(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet(folder / "a.parquet", [{"text": "good"}])
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])
    found = items(folder)
    assert texts(found) == ["good"]
    assert [item.reason for item in found if isinstance(item, Reject)] == ["unreadable_file"]


def test_a_parquet_file_that_lost_row_groups_since_the_plan_is_a_reject(tmp_path):
    rows = [{"text": text} for text in documents(40)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    (group,) = plan_groups(find_sources([str(path)], ReadOptions())[0], ReadOptions(), 100)
    assert group.pieces == 4
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)
    reader = reader_for(group, ReadOptions())
    assert len(list(reader.items(1))) == 20 and not reader.end_seen
    (reject,) = reader.items(3)
    assert "a.parquet has 2 pieces, but had 4 when the run began" in reject.detail and reader.end_seen


@pytest.mark.parametrize("dictionary", [True, False])
def test_large_rows_of_parquet_are_read_a_few_at_a_time(tmp_path, dictionary):
    """A file of some kilobytes: in a dictionary, the one text of 4 MB stands once."""
    rows = [f"{0 if dictionary else number}" + "x" * (4 << 20) for number in range(40)]
    table = pyarrow.table({"text": rows})
    more = {
        "compression": "zstd",
        "use_dictionary": dictionary,
        "dictionary_pagesize_limit": 1 << 30,
        "write_batch_size": 1,
    }
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **more)
    del table
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        found = reader_for(
            Group(0, "a", "parquet", (str(tmp_path / "a.parquet"),), 1, 1, 1 << 40), ReadOptions()
        ).items(0)
        assert [item.text == rows[number] for number, item in enumerate(found)] == [True] * 40
        assert pool.max_memory() < 200 << 20
    finally:
        pyarrow.set_memory_pool(before)


def test_a_parquet_row_that_is_no_utf8_is_one_reject(tmp_path):
    wanted = documents(300)
    data = [text.encode() for text in wanted]
    data[130] = b"caf\xe9"
    column = pyarrow.array(data, pyarrow.binary()).view(pyarrow.string())  # not checked, as by other writers
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    found = items(tmp_path / "a.parquet")
    assert texts(found) == wanted[:130] + wanted[131:]
    (reject,) = (item for item in found if isinstance(item, Reject))
    assert (reject.reason, reject.line) == ("invalid_utf8", 131)


def test_text_files_are_one_document_each(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\ndocument\n")
    (folder / "sub" / "b.md").write_text("second")
    (folder / "sub" / "c.txt").write_bytes(b"\xff")
    (folder / "d.txt.gz").write_bytes(compressed(b"third", ".gz"))
    (folder / "ignored.png").write_bytes(b"x")
    found = items(folder)
    assert sorted(texts(found)) == ["first\n\ndocument\n", "second", "third"]
    assert [item.reason for item in found if isinstance(item, Reject)] == ["invalid_utf8"]
    (sentence,) = find_sources([str(folder)], ReadOptions())[1]
    assert sentence == f"1 file(s) of unknown kind are left out, the first is {folder / 'ignored.png'}."


@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "\n---\n"])
@pytest.mark.parametrize("piece_bytes", [0, 900])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_text_is_split_on_a_separator(tmp_path, separator, piece_bytes, suffix):
    wanted = [text.replace("\n", " ") for text in documents(30)]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compressed((separator.join(wanted) + separator + separator).encode(), suffix))
    found = items(path, ReadOptions(separator=separator), piece_bytes)
    assert texts(found) == wanted
    assert all(item == Filtered("blank_line") for item in found if not isinstance(item, Document))


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("{}.jsonl.gz", ReadOptions(), lambda n: jsonl(documents(200, n)).decode()),
        ("{}.txt.gz", ReadOptions(separator="\n\n"), lambda n: "\n\n".join(f"{n} {m} text" for m in range(500))),
        ("{}.txt.gz", ReadOptions(), lambda n: f"file {n}"),
        ("{}.raw.gz", ReadOptions(), lambda n: "".join(f" = Page {n} {m} = \n \n text \n" for m in range(500))),
    ],
)
def test_one_broken_file_of_many_costs_no_other(tmp_path, name, options, wanted):
    folder, intact = tmp_path / "folder", tmp_path / "intact"
    folder.mkdir()
    intact.mkdir()
    for number in range(4):
        data = compressed(wanted(number).encode(), ".gz")
        (folder / name.format(number)).write_bytes(data[: len(data) // 2] if number == 1 else data)
        if number != 1:
            (intact / name.format(number)).write_bytes(data)
    found = items(folder, options)
    (reject,) = (item for item in found if isinstance(item, Reject))
    assert reject.reason == "broken_compression" and name.format(1) in reject.detail
    expected = texts(items(intact, options))
    assert expected and [text for text in texts(found) if text in set(expected)] == expected


@pytest.mark.parametrize("gone", [0, 1])
def test_a_file_that_cannot_be_opened_costs_no_other(tmp_path, gone):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "ab"]
    (group,) = plan_groups(find_sources([str(tmp_path)], ReadOptions())[0], ReadOptions())
    paths[gone].unlink()
    found = list(reader_for(group, ReadOptions()).items(0))
    assert [item.reason for item in found if isinstance(item, Reject)] == ["unreadable_file"]
    assert texts(found) == ["ba"[gone]]


@pytest.fixture
def small_cap(monkeypatch):
    """A document has at most 2,000 bytes, and files are read 500 bytes at a time."""
    for module in (base, lines_module, text_module):
        monkeypatch.setattr(module, "MAXIMUM", 2000)
    monkeypatch.setattr(lines_module, "_CHUNK", 500)
    monkeypatch.setattr(lines_module, "_LARGEST_CHUNK", 1000)


HUGE = "word " * 20_000
HUGE_FILES = {
    "a.jsonl": (jsonl([HUGE, "next"]), ReadOptions()),
    "b.jsonl": (b'{"text": "' + b"\\u0041" * 20_000 + b'"}\n' + jsonl(["next"]), ReadOptions()),
    "c.jsonl": (b"[" * 20_000 + b"\n" + jsonl(["next"]), ReadOptions()),
    "a.txt": ((HUGE + "|next").encode(), ReadOptions(separator="|")),
    "b.txt": (HUGE.encode(), ReadOptions()),
    "a.raw": (f" = One = \n{HUGE}\n{'line' * 99} \n = Next = \nnext\n".encode(), ReadOptions()),
    "b.raw": (("word \n" * 20_000 + " = Next = \nnext\n").encode(), ReadOptions()),
}


@pytest.mark.parametrize("name", HUGE_FILES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_document_above_the_cap_is_a_reject_and_costs_no_other(tmp_path, small_cap, name, suffix):
    data, options = HUGE_FILES[name]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(compressed(data, suffix))
    reject, *others = items(path, options)
    assert (reject.reason, reject.line) == ("too_long", 1)
    assert [text.split()[-1] for text in texts(others)] == ["next"] * (name != "b.txt")


@pytest.mark.parametrize("size", [1988, 1989])
def test_the_cap_is_the_same_however_the_file_is_read(tmp_path, small_cap, size):
    """A line of JSON has twelve bytes besides its text."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(jsonl([letter * size, letter]) for letter in "ab"))
    for piece_bytes in (0, 300):
        found = items(tmp_path / "a.jsonl", piece_bytes=piece_bytes)
        assert [len(text) for text in texts(found)] == [size, 1] * 2 if size == 1988 else [1, 1]
    (tmp_path / "b.txt").write_text("x" * (size + 12))
    parquet(tmp_path / "c.parquet", [{"text": "é" * 500 + "x" * (size - 988)}])
    for name in ("b.txt", "c.parquet"):
        (found,) = items(tmp_path / name)
        assert isinstance(found, Document) if size == 1988 else found.reason == "too_long"


def test_a_line_above_the_cap_is_never_held(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(600)), packer.flush()]))
    tracemalloc.start()
    try:
        (found,) = items(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.reason == "too_long" and peak < 320 << 20


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_breaks_off_inside_a_line_above_the_cap_costs_no_other(tmp_path, small_cap, name):
    data, options = HUGE_FILES[name]
    packed = compressed(data[:-20] + random.Random(1).randbytes(99_000).hex().encode(), ".gz")
    (tmp_path / f"{name}.gz").write_bytes(packed[:-9000])
    (tmp_path / f"z{name[1:]}").write_bytes(jsonl(["next"]) if name == "a.jsonl" else b"next")
    found = items(tmp_path, options)
    assert [item.reason for item in found if isinstance(item, Reject)] == ["broken_compression"]
    assert texts(found) == ["next"]


WIKI = " \n = First = \n \n text one \n \n = = Part = = \n \n more \n \n = Second = \n \n text two \n"


def test_wikitext_pages_are_documents(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(WIKI)
    first, second = texts(items(path))
    assert first.lstrip().startswith("= First =") and "= = Part = =" in first and "more" in first
    assert second.startswith(" = Second = ") and second.endswith("text two \n")
    assert first + second == WIKI


def test_the_real_wikitext_test_set_has_its_articles(shared_data, tmp_path):
    path = shared_data / "eval" / "wikitext" / "wiki.test.raw"
    found = texts(items(path))
    assert "".join(found) == path.read_text(encoding="utf-8")
    # Headings in the set's own spelling, counted line by line.
    lines = path.read_text(encoding="utf-8").split("\n")
    headings = [line for line in lines if line.startswith(" = ") and not line.startswith(" = = ")]
    headings = [line for line in headings if line.rstrip().endswith(" =") and not line.rstrip().endswith("= =")]
    assert len(found) == len(headings) and len(found) >= 60


def test_many_small_files_are_one_group_and_large_ones_are_cut(tmp_path):
    folder = tmp_path / "folder"
    for number in range(30):
        write_jsonl(folder / f"{number:02d}.jsonl", documents(2, number))
    big = write_jsonl(folder / "99.jsonl", documents(300))
    zst = write_jsonl(folder / "98.jsonl.zst", documents(3000))
    found, _ = find_sources([str(folder)], ReadOptions())
    groups = plan_groups(found, ReadOptions(), 10_000)
    assert [path for group in groups for path in group.files] == sorted(str(p) for p in folder.iterdir())
    assert [group.number for group in groups] == list(range(len(groups)))
    assert all(sum(os.path.getsize(f) for f in g.files) <= 10_000 for g in groups if len(g.files) > 1)
    assert max(len(group.files) for group in groups) > 5
    by_file = {group.files[0]: group for group in groups if len(group.files) == 1}
    assert by_file[str(big)].pieces == -(-big.stat().st_size // 10_000)
    assert by_file[str(zst)].pieces is None
