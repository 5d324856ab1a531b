"""Lines of byte ranges: every line once, whatever the ranges, the order and the reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import lines, spool
from data_prep.sources.base import Document, LargeDocument, ReadOptions, Reject
from data_prep.sources.lines import LineReader, LongLine, can_overlap
from data_prep.sources.long_json import read_long_line
from data_prep.sources.streams import ByteStream
from tests.data_prep.writing import compressed

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def plain(line):
    if isinstance(line, LongLine):
        parts = iter(line.read, b"")
        return b"".join(parts)
    return line


def expected_ranges(data: bytes, width: int, separator: bytes = b"\n"):
    """Lines by the range their first byte lies in, found by counting."""
    found: dict[int, list[bytes]] = {}
    parts = data.split(separator)
    if parts[-1] == b"":
        parts.pop()
    at = 0
    for part in parts:
        found.setdefault(at // width, []).append(part)
        at += len(part) + len(separator)
    return found


@RELAXED
@given(
    data=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"|", b"")), max_size=40),
    width=st.integers(1, 200),
    suffix=st.sampled_from(["", ".zst", ".gz"]),
    order=st.randoms(use_true_random=False),
    large=st.sampled_from([8, 1 << 20]),
    separator=st.sampled_from([b"\n", b"|-|"]),
)
def test_ranges_give_every_line_once(tmp_path, monkeypatch, data, width, suffix, order, large, separator):
    monkeypatch.setattr(lines, "LARGE", large)
    monkeypatch.setattr(lines, "_CHUNK", 16)
    if separator == b"|-|" and can_overlap(separator):
        separator = b"|=-"
    raw = separator.join(part.replace(separator, b"") for part in data)
    path = tmp_path / f"f{suffix}"
    path.write_bytes(compressed(raw, suffix))
    wanted = expected_ranges(raw, width, separator)
    ranges = list(range(len(raw) // width + 2))
    continuing = LineReader(str(path), separator)
    in_order = {n: [plain(line) for line in continuing.lines(n * width, (n + 1) * width)] for n in ranges}
    assert {n: found for n, found in in_order.items() if found} == wanted
    order.shuffle(ranges)
    jumping = LineReader(str(path), separator)
    for n in ranges:
        reader = jumping if n % 2 else LineReader(str(path), separator)
        assert [plain(line) for line in reader.lines(n * width, (n + 1) * width)] == wanted.get(n, [])


@RELAXED
@given(
    data=st.lists(st.binary(max_size=20), max_size=20), width=st.integers(1, 100), suffix=st.sampled_from(["", ".zst"])
)
def test_the_end_is_seen_in_the_last_range_that_holds_a_line_or_later(tmp_path, data, width, suffix):
    raw = b"".join(part.replace(b"\n", b"") + b"\n" for part in data)
    path = tmp_path / f"f{suffix}"
    path.write_bytes(compressed(raw, suffix))
    last = max(expected_ranges(raw, width), default=0)
    reader = LineReader(str(path))
    for n in range(last + 1):
        list(reader.lines(n * width, (n + 1) * width))
        assert not (reader.at_end and n < last)
    list(reader.lines((last + 1) * width, (last + 2) * width))
    assert reader.at_end


def test_lines_that_reach_over_ranges_do_not_make_it_read_again(tmp_path, monkeypatch):
    path = tmp_path / "f.zst"
    path.write_bytes(compressed(b"".join(b"x" * 1000 + b"\n" for _ in range(50)), ".zst"))
    opened = []
    monkeypatch.setattr(lines, "ByteStream", lambda *a: opened.append(a) or ByteStream(*a))
    reader = LineReader(str(path))
    found = [len(list(reader.lines(n * 700, (n + 1) * 700))) for n in range(80)]
    assert sum(found) == 50 and len(opened) == 1


def test_a_separator_that_overlaps_itself_is_recognised():
    assert can_overlap(b"\n\n") and can_overlap(b"aba")
    assert not can_overlap(b"\n") and not can_overlap(b"<|end|>x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def everything_is_large(monkeypatch):
    """Lines and texts of any size are read as those too large for memory are; returns how to choose the part read."""
    monkeypatch.setattr(lines, "LARGE", 0)
    monkeypatch.setattr(spool, "LARGE", 0)
    return lambda size: monkeypatch.setattr(lines, "_CHUNK", size)


def long_line(tmp_path, raw: bytes, options: ReadOptions):
    path = tmp_path / "line"
    path.write_bytes(raw)
    reader = LineReader(str(path))
    line = next(reader.lines(0, None))
    found = read_long_line(line, 5, options, tmp_path)
    assert line.skip() == len(raw)
    reader.stream.close()
    path.unlink()
    if isinstance(found, LargeDocument):
        text = found.path.read_bytes()[found.start : found.end].decode()
        found.path.unlink()
        return text, found.subset
    if isinstance(found, Document):
        return found.text, found.subset
    return found


@RELAXED
@given(
    record=st.dictionaries(st.sampled_from(["id", "meta", "text2", 'a"b', "\\"]), JSON, max_size=4),
    text=st.text(min_size=1, max_size=300).filter(lambda t: not t.isspace() and "\x00" not in t),
    nested=st.booleans(),
    escaped=st.booleans(),
    window=st.integers(1, 64),
    place=st.integers(0, 4),
)
def test_a_long_line_gives_what_the_json_parser_gives(
    tmp_path, everything_is_large, record, text, nested, escaped, window, place
):
    everything_is_large(window)
    items = list(record.items())
    items.insert(min(place, len(items)), ("text", {"body": text} if nested else text))
    raw = json.dumps(dict(items), ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    options = ReadOptions(text_field="text.body" if nested else "text")
    assert long_line(tmp_path, raw, options) == (text, None)
    assert list(tmp_path.iterdir()) == []


@RELAXED
@given(raw=st.binary(min_size=1, max_size=200), window=st.integers(1, 40))
def test_a_long_line_of_anything_is_a_document_or_a_reject(tmp_path, everything_is_large, raw, window):
    everything_is_large(window)
    raw = b'{"text": "' + raw.replace(b"\n", b"")
    try:
        record = json.loads(raw.decode())
        wanted = record.get("text") if isinstance(record, dict) else None
    except (ValueError, UnicodeDecodeError):
        wanted = None
    found = long_line(tmp_path, raw, ReadOptions())
    if isinstance(found, Reject):
        assert found.line == 5 and found.reason
        return
    assert found[0] == wanted


def test_a_long_line_keeps_its_subset_and_obeys_the_limit(tmp_path, everything_is_large):
    raw = json.dumps({"text": "x" * 100, "meta": {"pile_set_name": "Enron Emails"}}).encode()
    options = ReadOptions(subset_field="meta.pile_set_name")
    assert long_line(tmp_path, raw, options) == ("x" * 100, "Enron Emails")
    found = long_line(tmp_path, raw, ReadOptions(maximum_document_bytes=50))
    assert isinstance(found, Reject) and found.reason == "too_long"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "a\\u0000b"}', "nul_byte"),
        (b'{"text": " \\n "}', "empty_document"),
        (b'{"text": 3}', "wrong_type"),
        (b'{"other": "a"}', "missing_field"),
        (b'{"text": "abc', "invalid_json"),
        (b'["text"]', "invalid_json"),
        (b'{"text": "\\ud800"}', "invalid_json"),
        (b'{"text": "\xff"}', "invalid_utf8"),
    ],
)
def test_long_lines_are_rejected_like_short_ones(tmp_path, everything_is_large, raw, reason):
    found = long_line(tmp_path, raw, ReadOptions())
    assert isinstance(found, Reject) and found.reason == reason
    assert list(tmp_path.iterdir()) == []
