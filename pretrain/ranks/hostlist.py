"""Slurm's compressed host lists (`node[01-03,7],login`), written out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from data_prep.plain_text import plain
from pretrain.errors import LaunchError

# As many nodes as one Slurm cluster can have, all their names' characters, and more digits than any of their numbers.
_MOST_HOSTS = 65536
_MOST_CHARACTERS = 255 * _MOST_HOSTS
_MOST_DIGITS = 18
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_NAME = re.compile(r"[A-Za-z0-9_.:-]*")


def expand_hostlist(text: str) -> list[str]:
    """Host names in the order Slurm numbers them.

    Args:
        text: what SLURM_JOB_NODELIST holds: comma-separated names, each with any number of bracketed ranges.

    Raises:
        LaunchError: when `text` is not such a list, or stands for more hosts than a cluster can have.
    """
    hosts: list[str] = []
    try:
        for word in _split(text):
            hosts.extend("".join(name) for name in itertools.product(*_parts(word.strip())))
            _bound(len(hosts))
    except ValueError as problem:
        raise LaunchError(f"'{shown(text)}' is not a Slurm host list: {problem}.") from None
    return hosts


def shown(text: str) -> str:
    """A launcher's text as a message shows it: plain, and not too long."""
    return plain(text if len(text) <= 80 else f"{text[:80]}...")


# The functions below raise ValueError, with what is wrong.


def _split(text: str) -> Iterator[str]:
    """Words between commas that are outside brackets."""
    depth = start = 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ValueError("its brackets do not match")
        if letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise ValueError("its brackets do not match")
    yield text[start:]


def _parts(word: str) -> list[list[str]]:
    """The pieces of a word from left to right, each with the texts that it stands for."""
    if not word:
        raise ValueError("a name in it is empty")
    parts: list[list[str]] = []
    hosts, length = 1, 0
    for number, piece in enumerate(re.split(r"[\[\]]", word)):
        if number % 2 == 0 and not _NAME.fullmatch(piece):
            raise ValueError(f"'{shown(piece)}' is not part of a host's name")
        parts.append(_numbers(piece) if number % 2 else [piece])
        hosts, length = hosts * len(parts[-1]), length + len(parts[-1][0])
        # Checked before the next bracket is expanded, or a list of many brackets would take for ever.
        _bound(hosts)
        if hosts * length > _MOST_CHARACTERS:
            raise ValueError("its names are longer than those of hosts")
    return parts


def _numbers(inside: str) -> list[str]:
    """The numbers of one pair of brackets."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ValueError(f"'{shown(part)}' is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > _MOST_DIGITS:
            raise ValueError(f"a number in it has more than {_MOST_DIGITS} digits")
        if int(last) < int(first):
            raise ValueError(f"the range {part.strip()} ends before it begins")
        _bound(len(numbers) + int(last) - int(first) + 1)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _bound(hosts: int) -> None:
    if hosts > _MOST_HOSTS:
        raise ValueError(f"it stands for more than {_MOST_HOSTS:,} hosts")
