"""Lines of byte ranges: every line once, whatever the ranges, the order and the reader."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import lines
from data_prep.sources.lines import LineReader, LongLine, can_overlap
from data_prep.sources.streams import ByteStream
from tests.data_prep.writing import compressed

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def plain(line):
    """The line, or its length where it is above what is held."""
    return len(line) if isinstance(line, LongLine) else line


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
    monkeypatch.setattr(lines, "MAXIMUM", large)
    monkeypatch.setattr(lines, "_CHUNK", 16)
    if separator == b"|-|" and can_overlap(separator):
        separator = b"|=-"
    raw = separator.join(part.replace(separator, b"") for part in data)
    path = tmp_path / f"f{suffix}"
    path.write_bytes(compressed(raw, suffix))
    wanted = {
        n: [line if len(line) <= large else len(line) for line in found]
        for n, found in expected_ranges(raw, width, separator).items()
    }
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
