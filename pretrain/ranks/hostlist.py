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
_SHOWN = 100


def expand_hostlist(text: str) -> list[str]:
    """Host names in the order Slurm numbers them.

    Args:
        text: what SLURM_JOB_NODELIST holds: comma-separated names, each with any number of bracketed ranges.

    Raises:
        LaunchError: when `text` is not such a list, or stands for more hosts than a cluster can have.
    """
    hosts: list[str] = []
    for word in _split(text):
        hosts.extend("".join(name) for name in itertools.product(*_parts(word.strip(), text)))
        _bound(len(hosts), text)
    return hosts


def _split(text: str) -> Iterator[str]:
    """Words between commas that are outside brackets."""
    depth = start = 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _refusal(text, "its brackets do not match")
        if letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise _refusal(text, "its brackets do not match")
    yield text[start:]


def _parts(word: str, text: str) -> list[list[str]]:
    """The pieces of a word from left to right, each with the texts that it stands for."""
    if not word:
        raise _refusal(text, "a name in it is empty")
    parts: list[list[str]] = []
    hosts, length = 1, 0
    for number, piece in enumerate(re.split(r"[\[\]]", word)):
        if number % 2:
            parts.append(_numbers(piece, text))
        elif _NAME.fullmatch(piece):
            parts.append([piece])
        else:
            raise _refusal(text, f"'{_short(piece)}' is not part of a host's name")
        hosts, length = hosts * len(parts[-1]), length + len(parts[-1][0])
        # Checked before the next bracket is expanded, or a list of many brackets would take for ever.
        _bound(hosts, text)
        if hosts * length > _MOST_CHARACTERS:
            raise _refusal(text, "its names are longer than those of hosts")
    return parts


def _numbers(inside: str, text: str) -> list[str]:
    """The numbers of one pair of brackets."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise _refusal(text, f"'{_short(part)}' is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > _MOST_DIGITS:
            raise _refusal(text, f"a number in it has more than {_MOST_DIGITS} digits")
        count = int(last) - int(first) + 1
        if count < 1:
            raise _refusal(text, f"the range {part.strip()} ends before it begins")
        _bound(len(numbers) + count, text)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _bound(hosts: int, text: str) -> None:
    if hosts > _MOST_HOSTS:
        raise _refusal(text, f"it stands for more than {_MOST_HOSTS:,} hosts")


def _refusal(text: str, problem: str) -> LaunchError:
    return LaunchError(f"'{_short(text)}' is not a Slurm host list: {problem}.")


def _short(text: str) -> str:
    return plain(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
