"""YAML from outside: what JSON has, numbers as everybody writes them, and no small file that stands for a large one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import RecipeError
from pretrain.recipe.yaml_input import parse_yaml, read_yaml, write_yaml

BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-6", 1e-6),
        ("2e15", 2e15),
        (".5e3", 500.0),
        ("1.5E+3", 1500.0),
        ("-1_000", -1000),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("24:00:00", "24:00:00"),
        ("24:00", "24:00"),
        ("2001-01-01", "2001-01-01"),
        ("1.2.3", "1.2.3"),
        ("~", None),
        ("true", True),
        ("'1'", "1"),
        (".inf", math.inf),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_values_are_what_a_person_means(text: str, value: Any) -> None:
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, reason",
    [
        (BILLION_LAUGHS, "stands for more than 100,000 values"),
        ("[" * 1000, "nested more than 32 deep"),
        ("\n".join(" " * depth + "a:" for depth in range(200)), "nested more than 32 deep"),
        ("a: &a 1\nb: [" + "*a, " * 200 + "]", "more than 100 aliases"),
        ("&a [*a]", "an alias stands for what it is a part of"),
        ("9" * 5000, "more than 40 digits"),
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("!!timestamp x", "could not determine a constructor"),
        ("!!bool x", "cannot be read as YAML"),
        ("!!int ''", "cannot be read as YAML"),
        ("--- 1\n--- 2", "expected a single document"),
        ("a: [", "cannot be read as YAML"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=r"^the place: cannot be read as YAML: ") as caught:
        parse_yaml(text, "the place")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_read_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("é: [1, 1e-3]", encoding="utf-8")
    assert read_yaml(file) == {"é": [1, 1e-3]}
    file.write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read as YAML: 'utf-8' codec"):
        read_yaml(file)
    file.write_bytes(b"a: 1\n" + b"#" * (1 << 20))
    with pytest.raises(RecipeError, match=r"r\.yaml: holds more than 1,048,576 bytes"):
        read_yaml(file)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "absent.yaml")


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(plain_values)
def test_what_is_written_comes_back(value: Any) -> None:
    assert parse_yaml(write_yaml(value), "here") == value
    if json.dumps(value).isascii() and "\\u" not in json.dumps(value):
        assert parse_yaml(json.dumps(value).replace("Infinity", ".inf"), "here") == value


@given(st.text(st.sampled_from("ab1:-_.&*[]{},?!|> \n'\"#~e+x0"), max_size=60))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    try:
        parse_yaml(text, "here")
    except RecipeError:
        return
