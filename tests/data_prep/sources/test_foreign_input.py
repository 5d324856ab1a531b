"""JSON, names and text from outside: read, kept inside their folder, shown without what a terminal obeys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.json_input import parse_json, read_json
from data_prep.paths import inside
from data_prep.plain_text import plain


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1, 2,]", "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_is_one_sentence(text: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^the place: .*{reason}") as caught:
        parse_json(text, "the place")
    assert "\n" not in str(caught.value)


def test_a_file_of_json_is_read_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"é": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(file) == {"é": [1, 2.5, None]}
    with pytest.raises(DataError, match=r"a\.json: holds more than 10 bytes"):
        read_json(file, maximum_bytes=10)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_comes_back_as_it_was(value: object) -> None:
    assert parse_json(json.dumps(value), "here") == value


@pytest.mark.parametrize(
    "name", ["", ".", "./", "//x", "/etc/passwd", "../x", "a/../../x", "a/..", "\0", 7, None, ["a"], "link/x", "out"]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "out").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"^manifest\.json: "):
        inside(folder, name, "manifest.json")


def test_a_name_inside_its_folder_is_its_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    for name in ("a", "a/b.bin", "..a", "alias/b", "./a"):
        assert inside(tmp_path, name, "here") == tmp_path / name
    assert inside(tmp_path / "alias", "a", "here") == tmp_path / "alias" / "a"


@given(st.text(st.characters()))
def test_text_from_outside_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = plain(text)
    shown.encode("utf-8")
    # ECMA-48: the control sets C0 and C1, DEL; Unicode's overrides and isolates of direction.
    assert not any(
        ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069 for c in shown
    )
    if text.isascii() and text.isprintable():
        assert shown == text


def test_escapes_are_written_out_and_ordinary_text_stays() -> None:
    assert plain("\x1b[31mred\x07 \u202eevil \udcff é 漢字 👍\n") == r"\x1b[31mred\x07 \u202eevil \udcff é 漢字 👍\n"
    assert plain("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
