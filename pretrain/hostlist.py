"""Slurm's compressed host lists (`node[01-03,7],login`), written out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pretrain.errors import LaunchError

_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def expand_hostlist(text: str) -> list[str]:
    """Host names in the order Slurm numbers them.

    Args:
        text: what SLURM_JOB_NODELIST holds: comma-separated names, each with any number of bracketed ranges.

    Raises:
        LaunchError: when `text` is not such a list.
    """
    hosts: list[str] = []
    for word in _split(text):
        hosts.extend(_expand(word, text))
    return hosts


def _split(text: str) -> Iterator[str]:
    """Words between commas that are outside brackets."""
    depth = start = 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise LaunchError(f"'{text}' is not a Slurm host list: its brackets do not match.")
        if letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise LaunchError(f"'{text}' is not a Slurm host list: its brackets do not match.")
    yield text[start:]


def _expand(word: str, text: str) -> Iterator[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        if not word.strip():
            raise LaunchError(f"'{text}' is not a Slurm host list: a name in it is empty.")
        yield word.strip()
        return
    inside, _, tail = rest.partition("]")
    for part in inside.split(","):
        match = _RANGE.match(part.strip())
        if not match:
            raise LaunchError(f"'{text}' is not a Slurm host list: '{part}' is neither a number nor a range.")
        first, last = match.group(1), match.group(2) or match.group(1)
        for number in range(int(first), int(last) + 1):
            name = f"{head.strip()}{number:0{len(first)}d}"
            yield from _expand(name + tail, text) if tail else (name,)
