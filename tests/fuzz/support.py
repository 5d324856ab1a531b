"""How every kind of input from outside is fuzzed: many mutations of a good one, each used or refused in a sentence.

An input may be refused with an error meant for a person, or used. Anything else is a fault: another exception, more
than two seconds of processor time, or a value that is not the one that was given.
"""

from __future__ import annotations

import json
import math
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest, write_manifest
from data_prep.tokenizing.packing import write_packing
from mor_model.errors import ConfigError
from pretrain.errors import UserError
from tests.data_prep.support import make_documents, write_dataset

# Errors whose message alone a person gets to see; `mor` prints them without a traceback.
MEANT_FOR_A_PERSON = (UserError, DataError, ConfigError)
LIMIT_SECONDS = 2.0

# So many inputs of each kind in `make test`, and in `make test-slow`.
counts = pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])

T = TypeVar("T")
R = TypeVar("R")


class Hang(BaseException):
    """Not an `Exception`: code that swallows those must not swallow this one."""


def drive(
    count: int,
    make: Callable[[random.Random], T],
    use: Callable[[T], R],
    *,
    seed: object = 0,
    changed: Callable[[T, R], str | None] = lambda given, result: None,
    used: float = 0.0,
    refused: float = 0.0,
) -> None:
    """Make `count` inputs and use each; fail at the first fault, and name the input.

    Args:
        changed: what was changed silently, given an input and the result of `use`; None where nothing was.
        used, refused: smallest shares of inputs to be accepted and refused, so that mutations are neither all harmless
            nor all fatal.
    """
    refusals = 0
    for number in range(count):
        given = make(random.Random(f"{seed} {number}"))
        try:
            with processor_time(LIMIT_SECONDS):
                result = use(given)
        except MEANT_FOR_A_PERSON as error:
            text = str(error)
            assert text.strip(), f"input {number}: {type(error).__name__} says nothing: {given!r:.2000}"
            assert "Traceback" not in text and len(text) < 5000, f"input {number}: {text:.2000}"
            refusals += 1
        except (Exception, Hang) as error:
            raise AssertionError(
                f"input {number}: {type(error).__name__}: {error!s:.500} for {given!r:.2000}"
            ) from error
        else:
            change = changed(given, result)
            assert change is None, f"input {number} was changed silently: {change:.500}; {given!r:.2000}"
    assert count - refusals >= used * count and refusals >= refused * count, f"{refusals} of {count} were refused"


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raise `Hang` in this thread when the block takes more processor time; how busy the machine is does not count."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


ODD_TEXTS = ["", " ", "x", "../x", "/etc/passwd", "\x00", "\x1b[31mred", "[/red]", "\ud800", "é", "a" * 300]
ODD_TEXTS += ["1e-6", "~", "null", "[" * 50, "=1+1", "auto", "zero3"]
ODD_VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 2**31, 2**64, 10**30, 0.5, 1e-6, 1e308, math.nan, math.inf]
ODD_VALUES += [[], {}, [[]], {"x": 1}, {"": None}, [None], *ODD_TEXTS]


def mutate_value(value: Any, source: random.Random) -> Any:
    """`value` (as JSON has them) with one part, at any depth, removed, renamed, repeated or replaced by another."""
    if isinstance(value, (dict, list)) and value and source.random() < 0.85:
        key = source.choice(list(value)) if isinstance(value, dict) else source.randrange(len(value))
        copy: Any = value.copy()
        chance = source.random()
        if chance < 0.1:
            del copy[key]
        elif chance < 0.2 and isinstance(copy, dict):
            copy[mutate_text(str(key), source)] = copy.pop(key)
        elif chance < 0.25 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = mutate_value(value[key], source)
        return copy
    return source.choice(ODD_VALUES)


def mutate_values(values: Any, source: random.Random) -> Any:
    """`values` with one to three changes."""
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        values = mutate_value(values, source)
    return values


def mutate_text(text: str, source: random.Random) -> str:
    """`text` with a few characters changed, removed, repeated or put in."""
    characters = list(text)
    for _ in range(source.choice([1, 1, 2, 5])):
        place = source.randrange(len(characters) + 1)
        match source.randrange(5):
            case 0:
                characters[place : place + 1] = source.choice("\x00\n\t -_.:,[]{}&*!|>'\"%@`#~0aé\u202e")
            case 1:
                del characters[place : place + source.choice([1, 2, 8])]
            case 2:
                characters[place:place] = source.choice(ODD_TEXTS)
            case 3:
                del characters[place:]
            case 4:
                characters[place:place] = characters[place : place + 8]
    return "".join(characters)


def mutate_bytes(data: bytes, source: random.Random) -> bytes:
    """`data` with a few bytes changed, cut off, inserted, or a number replaced by an extreme one."""
    raw = bytearray(data)
    for _ in range(source.choice([1, 1, 2, 5])):
        place = source.randrange(len(raw)) if raw else 0
        match source.randrange(5):
            case 0:
                raw[place : place + 1] = bytes([source.randrange(256)])
            case 1:
                del raw[place:]
            case 2:
                raw[place:place] = source.randbytes(source.choice([1, 4, 8, 100]))
            case 3:
                extreme = source.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
                raw[place : place + 8] = extreme.to_bytes(8, "little")[: len(raw) - place]
            case 4:
                del raw[place : place + source.choice([1, 2, 8])]
    return bytes(raw)


def mutate_file(text: str, source: random.Random) -> bytes:
    """A file that held `text`, changed as text or as bytes."""
    if source.random() < 0.5:
        return mutate_bytes(text.encode(), source)
    return mutate_text(text, source).encode("utf-8", "surrogatepass")


def mutate_json(value: Any, source: random.Random) -> bytes:
    """JSON text of a changed value, or changed or hostile JSON text."""
    if source.random() < 0.7:
        return json.dumps(mutate_value(value, source)).encode()
    text = json.dumps(value)
    if source.random() < 0.2:
        hostile = source.choice(["[" * 2000 + "]" * 2000, "9" * 5000, "NaN"])
        return re.sub(r"\b\d+\b", hostile, text, count=1).encode()
    return mutate_file(text, source)


def from_file(file: Path, read: Callable[[Path], R]) -> Callable[[str | bytes], R]:
    """For `drive`: write each input to `file`, and read it."""

    def use(content: str | bytes) -> R:
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return read(file)

    return use


def packed_dataset(folder: Path, length: int) -> Path:
    """A data set folder with two shards, packed for sequences of `length`."""
    documents = [document for document in make_documents(30, 1) if len(document) > 1]
    write_dataset(folder, {"train": [("web", documents), ("law", documents[:7])]})
    manifest = read_manifest(folder)
    for shard in manifest.splits["train"].shards:
        write_packing(folder / shard.name, length)
    write_manifest(folder, replace(manifest, settings={"packing": "best-fit", "sequence_length": length}))
    return folder


def lost(given: Any, kept: Any, place: str = "") -> str | None:
    """The first part of `given` (values as JSON has them) that `kept` does not hold as well; None where it holds all.

    `kept` may say more than `given`, hold tuples for lists, and numbers of another kind of the same size (NaN is NaN).
    """
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs = [(f"{place}.{key}", given[key], kept.get(key, ...)) for key in given]
    elif isinstance(given, (list, tuple)) and isinstance(kept, (list, tuple)) and len(given) == len(kept):
        pairs = [(f"{place}.{index}", *pair) for index, pair in enumerate(zip(given, kept, strict=True))]
    elif isinstance(given, bool) is isinstance(kept, bool) and (given == kept or _same_number(given, kept)):
        return None
    else:
        return f"{place.removeprefix('.')}: {given!r} against {kept!r}"
    return next((found for where, one, other in pairs if (found := lost(one, other, where)) is not None), None)


def _same_number(given: Any, kept: Any) -> bool:
    if not isinstance(kept, float):
        return False
    return float(given) == kept if isinstance(given, int) else given != given and kept != kept


def leaves(values: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Everything in nested dictionaries that is none itself, or an empty one, by its keys."""
    if not isinstance(values, dict) or not values:
        return {place: values}
    return {path: leaf for key in values for path, leaf in leaves(values[key], (*place, str(key))).items()}
