"""Files of other stacks in and out, against documents known beforehand."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.interchange import exports as exports_module
from data_prep.interchange import imports as module
from data_prep.interchange.exports import export_megatron
from data_prep.interchange.imports import import_files
from data_prep.reading.dataset import open_dataset, open_shard
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from tests.data_prep.support import make_documents, read_index_independently, write_shard_independently

EOD = 0
DOCUMENTS = make_documents(60, 5)
FILLED = [document for document in DOCUMENTS if len(document) > 1]
EMPTY = len(DOCUMENTS) - len(FILLED)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer of 1000 words whose END_OF_DOCUMENT is 0."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    vocabulary = {"<|endoftext|>": EOD, **{f"w{number}": number for number in range(1, 1000)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    return path


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 50)
    monkeypatch.setattr(exports_module, "_PIECE", 50)


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


def read_back(folder: Path, split: str = "train") -> list[list[int]]:
    documents: list[list[int]] = []
    manifest = read_manifest(folder)
    for entry in manifest.splits[split].shards:
        open_shard(folder, entry, manifest.dtype)
        documents += read_index_independently(folder / entry.name)
    return documents


@pytest.mark.parametrize(("code", "kind"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_and_neox_files(tmp_path: Path, tokenizer: Path, code: int, kind: str) -> None:
    write_shard_independently(tmp_path / "in" / "web_text_document", DOCUMENTS, code, kind)
    report = import_files("megatron", [str(tmp_path / "in" / "web_text_document.bin")], tmp_path / "out", tokenizer)
    assert read_back(tmp_path / "out") == FILLED
    assert (report.empty, report.unended) == (EMPTY, 0)
    assert verify_dataset(tmp_path / "out").problems == []
    data = open_dataset(tmp_path / "out")
    assert data.sources == ["web_text_document"] and data.dtype == np.uint16
    assert data.manifest.rejects == {"empty_document": EMPTY}
    assert report.sample.split()[0] == f"w{FILLED[0][0]}"


@pytest.mark.parametrize("width", [2, 4])
def test_datatrove_files(tmp_path: Path, tokenizer: Path, width: int) -> None:
    np.array(flat(DOCUMENTS), f"<u{width}").tofile(tmp_path / "00000_tokens.ds")
    np.cumsum([len(document) for document in DOCUMENTS]).astype("<u8").tofile(tmp_path / "00000_tokens.ds.index")
    import_files("datatrove", [str(tmp_path / "00000_tokens.ds")], tmp_path / "out", tokenizer)
    assert read_back(tmp_path / "out") == FILLED and verify_dataset(tmp_path / "out").ok


def test_nanogpt_files_by_split(tmp_path: Path, tokenizer: Path) -> None:
    long = [1 + number % 900 for number in range(1234)]  # over many pieces, without END_OF_DOCUMENT
    np.array(flat(DOCUMENTS) + long, "<u2").tofile(tmp_path / "train.bin")
    np.array(flat(DOCUMENTS[:9]), "<u2").tofile(tmp_path / "val.bin")
    files = [str(tmp_path / "train.bin"), f"validation={tmp_path / 'val.bin'}"]
    report = import_files("nanogpt", files, tmp_path / "out", tokenizer)
    expected = [*FILLED, [*long, EOD]]
    assert read_back(tmp_path / "out") == expected and report.unended == 1
    assert read_back(tmp_path / "out", "validation") == [document for document in DOCUMENTS[:9] if len(document) > 1]
    assert [entry["name"] for entry in report.manifest.sources] == ["train", "val"]
    assert report.manifest.settings["files"] == ["train=train.bin", "validation=val.bin"]
    counts = Counter(len(document).bit_length() - 1 for document in expected)
    lengths = report.manifest.statistics["lengths_log2"]["train"]
    assert lengths == [counts[power] for power in range(max(counts) + 1)]


@pytest.mark.parametrize(("dtype", "named"), [("<u2", ""), ("<u2", "uint16"), ("<u4", "uint32")])
def test_olmo_files_with_and_without_numpys_header(tmp_path: Path, tokenizer: Path, dtype: str, named: str) -> None:
    ids = np.array(flat(DOCUMENTS), dtype)
    ids.tofile(tmp_path / "part-0.npy")
    np.save(tmp_path / "part-1.npy", ids)
    files = [str(tmp_path / "part-0.npy"), str(tmp_path / "part-1.npy")]
    import_files("olmo", files, tmp_path / "out", tokenizer, dtype=named)
    assert read_back(tmp_path / "out") == FILLED + FILLED


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=12), piece=st.integers(1, 12))
def test_ends_are_set_right_wherever_they_are_missing(
    documents: list[list[int]], piece: int, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("import")
    module._PIECE = piece
    write_shard_independently(folder / "in", documents, 8, "<u2")
    expected: list[list[int]] = []
    for document in documents:
        text: list[int] = []
        for token in [*document, *([] if document and document[-1] == EOD else [EOD])]:
            text.append(token)
            if token == EOD:
                expected += [text] if len(text) > 1 else []
                text = []
    if not expected:
        with pytest.raises(DataError, match="holds no document"):
            import_files("megatron", [str(folder / "in")], folder / "out", tokenizer)
        assert list((folder / "out").iterdir()) == []
        return
    report = import_files("megatron", [str(folder / "in")], folder / "out", tokenizer)
    assert read_back(folder / "out") == expected
    assert report.unended == sum(bool(document) and document[-1] != EOD for document in documents)
    assert verify_dataset(folder / "out").ok


@pytest.mark.parametrize(
    ("kind", "write", "sentence"),
    [
        ("mosaic", lambda p: None, "no import of 'mosaic'; known are megatron, datatrove, nanogpt, olmo"),
        ("nanogpt", lambda p: None, "cannot be read: No such file"),
        ("nanogpt", lambda p: p.write_bytes(b"abc"), "has 3 bytes, which is no whole number of uint16"),
        ("nanogpt", lambda p: p.write_bytes(b""), "has 0 bytes"),
        ("nanogpt", lambda p: p.write_bytes(b"\x00\x00" * 3), "holds no document"),
        ("nanogpt", lambda p: p.write_bytes(b"\xff\xff" * 4), "ids from 65535 to 65535, but the tokenizer has 1000"),
        ("olmo", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00garbage"), "begins like a numpy file but cannot be read"),
        ("olmo", lambda p: np.save(p.open("wb"), np.ones((2, 2))), "expected a flat array of integers"),
        ("datatrove", lambda p: p.write_bytes(b"abcd"), "index cannot be read"),
        (
            "datatrove",
            lambda p: (p.write_bytes(bytes(18)), np.array([4, 8], "<u8").tofile(f"{p}.index")),
            "has 18 bytes, which are not 2 or 4 for each of the 8 ids",
        ),
        ("megatron", lambda p: p.write_bytes(b"abcd"), "idx is missing"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path: Path, tokenizer: Path, kind: str, write, sentence: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "x.bin")
    with pytest.raises(DataError, match=sentence):
        import_files(kind, [str(tmp_path / "x.bin")], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_failure_in_a_later_file_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    np.array(flat(DOCUMENTS), "<u2").tofile(tmp_path / "good.bin")
    np.array([5000], "<u2").tofile(tmp_path / "bad.bin")
    with pytest.raises(DataError, match=r"bad\.bin holds ids from 5000"):
        import_files("nanogpt", [str(tmp_path / "good.bin"), str(tmp_path / "bad.bin")], tmp_path / "out", tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_export_joins_the_shards_of_a_split_under_megatrons_names(tmp_path: Path, tokenizer: Path) -> None:
    for name, documents in (("a", DOCUMENTS[:20]), ("b", DOCUMENTS[20:45]), ("c", DOCUMENTS[45:])):
        np.array(flat(documents), "<u2").tofile(tmp_path / f"{name}.bin")
    long = [*range(1, 400), EOD]
    np.array(long, "<u2").tofile(tmp_path / "d.bin")
    files = [str(tmp_path / "a.bin"), str(tmp_path / "b.bin"), str(tmp_path / "d.bin"), f"test={tmp_path / 'c.bin'}"]
    import_files("nanogpt", files, tmp_path / "data", tokenizer)
    (tmp_path / "data" / "tokenizer" / "notes.txt").write_text("no tokenizer")
    report = export_megatron(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer" / "notes.txt").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test_text_document.bin",
        "test_text_document.idx",
        "tokenizer",
        "train_text_document.bin",
        "train_text_document.idx",
    ]
    expected = [document for document in DOCUMENTS[:45] if len(document) > 1]
    assert read_index_independently(tmp_path / "out" / "train_text_document") == [*expected, long]
    assert read_index_independently(report.prefixes["test"]) == [d for d in DOCUMENTS[45:] if len(d) > 1]
    assert report.summaries["train"].documents == len(expected) + 1
    assert report.tokenizer.read_bytes() == tokenizer.read_bytes()
    # and in again
    import_files("megatron", [str(report.prefixes["train"])], tmp_path / "again", tokenizer)
    assert read_back(tmp_path / "again") == [*expected, long]


def test_export_refuses_what_is_damaged_or_in_the_way(tmp_path: Path, tokenizer: Path) -> None:
    np.array(flat(DOCUMENTS), "<u2").tofile(tmp_path / "train.bin")
    import_files("nanogpt", [str(tmp_path / "train.bin")], tmp_path / "data", tokenizer)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(DataError, match="exists already and is not empty"):
        export_megatron(tmp_path / "data", tmp_path / "used")
    with pytest.raises(DataError, match="not empty"):
        import_files("nanogpt", [str(tmp_path / "train.bin")], tmp_path / "data", tokenizer)
    index = tmp_path / "data" / "train-00000.idx"
    raw = bytearray(index.read_bytes())
    raw[34:38] = (10**6).to_bytes(4, "little")
    index.write_bytes(raw)
    with pytest.raises(DataError, match="lie outside of it"):
        export_megatron(tmp_path / "data", tmp_path / "out")
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        export_megatron(tmp_path / "data", tmp_path / "out2")


def test_the_tokenizer_that_came_with_an_import_is_verified(tmp_path: Path, tokenizer: Path) -> None:
    np.array(flat(DOCUMENTS), "<u2").tofile(tmp_path / "train.bin")
    import_files("nanogpt", [str(tmp_path / "train.bin")], tmp_path / "data", tokenizer)
    copy = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    content = json.loads(copy.read_text())
    content["model"]["vocab"]["w1000"] = 1000
    copy.write_text(json.dumps(content))
    problems = verify_dataset(tmp_path / "data").problems
    assert any("has fingerprint" in problem for problem in problems)
    assert any("has vocabulary size 1001, the manifest says 1000" in problem for problem in problems)
    copy.unlink()
    assert any("no tokenizer at" in problem for problem in verify_dataset(tmp_path / "data").problems)


@pytest.mark.parametrize("kind", ["nanogpt", "olmo"])
@pytest.mark.parametrize("width", [4, 8])
def test_ids_wider_than_they_are_taken_for_are_refused_until_their_width_is_said(
    tmp_path: Path, tokenizer: Path, kind: str, width: int
) -> None:
    """Read as 16 bits, each of these ids would be followed by one or three END_OF_DOCUMENT."""
    path = tmp_path / "x.bin"
    np.array(flat(FILLED), f"<u{width}").tofile(path)
    with pytest.raises(
        DataError, match=rf"x\.bin can be read as uint16 and as uint{8 * width} .* --dtype uint{8 * width}"
    ):
        import_files(kind, [str(path)], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    import_files(kind, [str(path)], tmp_path / "out", tokenizer, dtype=f"uint{8 * width}")
    assert read_back(tmp_path / "out") == FILLED


def test_what_is_said_of_the_width_holds_where_both_are_possible(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "x.bin"
    np.array([[number, EOD] for number in range(1, 40)], "<u2").tofile(path)
    with pytest.raises(DataError, match="or --dtype uint16"):
        import_files("nanogpt", [str(path)], tmp_path / "out", tokenizer)
    import_files("nanogpt", [str(path)], tmp_path / "out", tokenizer, dtype="uint16")
    assert read_back(tmp_path / "out") == [[number, EOD] for number in range(1, 40)]
    with pytest.raises(DataError, match="raw ids are uint16, uint32, uint64, not 'int16'"):
        import_files("nanogpt", [str(path)], tmp_path / "out2", tokenizer, dtype="int16")


def test_a_width_that_a_file_says_itself_is_not_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    write_shard_independently(tmp_path / "x", FILLED, 8, "<u2")
    with pytest.raises(DataError, match="megatron files say themselves how wide their ids are"):
        import_files("megatron", [str(tmp_path / "x")], tmp_path / "out", tokenizer, dtype="uint32")
    np.save(tmp_path / "y.npy", np.array(flat(FILLED), "<u2"))
    with pytest.raises(DataError, match=r"y\.npy says itself that its ids are uint16; leave out --dtype uint32"):
        import_files("olmo", [str(tmp_path / "y.npy")], tmp_path / "out", tokenizer, dtype="uint32")
    import_files("olmo", [str(tmp_path / "y.npy")], tmp_path / "out", tokenizer, dtype="uint16")
    assert read_back(tmp_path / "out") == FILLED


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (np.array([20240520, 1, 300, *[0] * 253], "<i4").tobytes(), r"format is llm\.c's, .*`tail -c \+1025"),
        (gzip.compress(bytes(600), mtime=0), "format is gzip's"),
        (zstandard.compress(bytes(600)), "format is zstd's"),
        (lzma.compress(bytes(600)), "format is xz's"),
        (bz2.compress(bytes(600)), "format is bzip2's"),
        (b"PAR1" + bytes(600), "format is parquet's"),
        (b"MMIDIDX\x00\x00" + bytes(600), "format is an index of Megatron's"),
        (b'{"text": "no ids at all"}\n' * 20, "holds no raw ids but text"),
    ],
)
@pytest.mark.parametrize("kind", ["nanogpt", "olmo", "datatrove"])
def test_other_formats_are_named(tmp_path: Path, tokenizer: Path, kind: str, data: bytes, sentence: str) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    np.array([len(data) // 2], "<u8").tofile(tmp_path / "x.bin.index")
    with pytest.raises(DataError, match=sentence):
        import_files(kind, [str(tmp_path / "x.bin")], tmp_path / "out", tokenizer)


@pytest.mark.parametrize("again", ["{folder}/./x.bin", "validation={folder}/x.bin", "{folder}/link.bin"])
def test_a_file_given_twice_is_refused(tmp_path: Path, tokenizer: Path, again: str) -> None:
    np.array(flat(FILLED), "<u2").tofile(tmp_path / "x.bin")
    (tmp_path / "link.bin").symlink_to("x.bin")
    with pytest.raises(DataError, match="is given twice; its documents would be in the data set twice"):
        import_files("nanogpt", [str(tmp_path / "x.bin"), again.format(folder=tmp_path)], tmp_path / "out", tokenizer)
    write_shard_independently(tmp_path / "x", FILLED, 8, "<u2")
    with pytest.raises(DataError, match=r"x\.idx, the same file as .*x, is given twice"):
        import_files("megatron", [str(tmp_path / "x"), str(tmp_path / "x.idx")], tmp_path / "out", tokenizer)


def test_a_file_that_is_named_like_a_split_is_itself(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.array(flat(FILLED), "<u2").tofile("validation=x.bin")
    import_files("nanogpt", ["validation=x.bin"], tmp_path / "out", tokenizer)
    assert read_back(tmp_path / "out", "train") == FILLED
