"""What is wrong with a recipe, an experiment, clusters.yaml or a DeepSpeed JSON, in one sentence.

Every key and value that is repeated here comes from outside, so it is shown as `plain` text and never at full length.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from data_prep.plain_text import plain

_LONGEST = 80

# What a value should have been, in the words of a recipe's author, by pydantic's name for what is wrong.
_WANTED = {
    **dict.fromkeys(("model_type", "dict_type"), "must be a section with keys of its own"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list, such as [a, b]"),
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "string_type": "must be text",
    "string_too_short": "must not be empty",
}


def first_problem(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong with values for `root`, as one sentence that begins with its dotted place; an
    unknown key with the nearest known one.
    """
    # An unknown key comes first: a misspelling also makes the right key look missing.
    problem = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")[0]
    location, unknown = list(problem["loc"]), problem["type"] == "extra_forbidden"
    key = str(location.pop()) if unknown else ""
    place, section = _walk(location, root)
    if unknown:
        return unknown_key(place, key, keys_of(section) if section is not None else ())
    where = ".".join(place)
    if problem["type"] == "missing":
        return f"'{where}' is missing; it has no default."
    message = _WANTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if message.startswith("Input should be "):
        message = message.replace("Input should be", "must be", 1)
    given = problem.get("input")
    is_single = isinstance(given, (str, int, float, bool, type(None)))
    shown = f" (given: {shorten(given)})" if is_single and repr(given) not in message else ""
    end = "?" if message.endswith("?") else "."
    return f"{where + ': ' if where else ''}{message[:1].lower() + message[1:].rstrip('.?')}{shown}{end}"


def unknown_key(place: Iterable[str], key: str, known: Iterable[str]) -> str:
    """That the section at `place` has no `key`, with the nearest key that it has, as an override would name it."""
    above = "".join(f"{part}." for part in place)
    return f"unknown key '{above}{_brief(plain(key))}'; {nearest(key, known, above)}"


def nearest(given: object, known: Iterable[str], above: str = "") -> str:
    """ "did you mean" or the list of what there is, to end a message with; `above` goes before the name it means."""
    names = list(known)
    # People write weight-decay and Weight_Decay.
    alike = {name.lower().replace("-", "_"): name for name in reversed(names)}
    near = difflib.get_close_matches(str(given)[:_LONGEST].lower().replace("-", "_"), alike, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{above}{plain(alike[near[0]])}'?"
    return f"known are {', '.join(map(plain, names))}."


def shorten(value: object) -> str:
    """A value as Python writes it, which shows what cannot be seen, cut where it is long."""
    return _brief(repr(value))


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys of a section as files write them: aliases, and names of fields beside them."""
    names = {field.alias or name: None for name, field in section.model_fields.items()}
    return [*names, *(name for name in section.model_fields if name not in names)]


def below(annotation: Any, part: str | int) -> Any:
    """The annotation of the value at key or index `part` of a value of this one; None where it has no such part."""
    for form in forms(annotation):
        if isinstance(form, type) and issubclass(form, BaseModel):
            for name, field in form.model_fields.items():
                if part in (name, field.alias):
                    return field.annotation
        elif get_origin(form) is dict:
            return get_args(form)[1]
        elif get_origin(form) in (tuple, list) and isinstance(part, int):
            kinds = get_args(form)
            return kinds[part] if part < len(kinds) and kinds[part] is not ... else kinds[0]
    return None


def forms(annotation: Any) -> list[Any]:
    """The kinds of value that an annotation allows: the members of a union, without what merely constrains them."""
    if get_origin(annotation) is Annotated:
        return forms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [form for member in get_args(annotation) for form in forms(member)]
    return [annotation]


def _walk(location: list[Any], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """Keys and indices of pydantic's `location`, and the section it ends at. The rest are pydantic's own words, such as
    the member of a union that did not fit.
    """
    place: list[str] = []
    annotation: Any = root
    for part in location:
        inner = below(annotation, part) if part != "[key]" else None
        if inner is not None:
            place.append(_brief(plain(part)))
            annotation = inner
    sections = [form for form in forms(annotation) if isinstance(form, type) and issubclass(form, BaseModel)]
    return place, sections[0] if sections else None


def _brief(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
