"""Host lists: expanded as an obvious program expands them, or refused."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks.hostlist import expand_hostlist
from tests.fuzz.support import LIMIT_SECONDS, counts, drive, mutate_text, processor_time


def written(source: random.Random) -> str:
    """A list of a few words with up to three pairs of brackets each."""
    words = []
    for _ in range(source.choice([1, 1, 2, 5])):
        word = source.choice(["", "n", "gpu-", "rack0.", "Z_9"])
        for _ in range(source.randrange(4)):
            word += f"[{','.join(numbers(source) for _ in range(source.choice([1, 1, 3])))}]{source.choice(['', 'x'])}"
        words.append(word or "login")
    return ",".join(words)


def numbers(source: random.Random) -> str:
    first = source.choice([0, 1, 7, 98, 999, source.randrange(10**6)])
    width = source.choice([0, 0, 3, 6])
    last = first + source.choice([0, 1, 2, 9, 40])
    return f"{first:0{width}d}" if last == first else f"{first:0{width}d}-{last}"


def obvious(text: str) -> list[str]:
    """The first bracket of each word written out, and the rest by the same rule."""
    hosts = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.search(r"\[([^\]]*)\]", word)
        if match is None:
            hosts.append(word.strip())
            continue
        for part in match[1].split(","):
            ends = [end.strip() for end in part.split("-")]
            for number in range(int(ends[0]), int(ends[-1]) + 1):
                hosts += obvious(word[: match.start()] + str(number).zfill(len(ends[0])) + word[match.end() :])
    return hosts


def compare(text: str, hosts: list[str]) -> str | None:
    expected = obvious(text)
    different = [pair for pair in itertools.zip_longest(hosts, expected) if pair[0] != pair[1]]
    return f"{different[0]}" if different else None


@counts
def test_host_lists_are_written_out(count):
    drive(count, written, expand_hostlist, changed=compare, used=0.7)


@counts
def test_damaged_host_lists_are_refused_or_written_out(count):
    def damaged(source: random.Random) -> str:
        return mutate_text(written(source), source)

    drive(count, damaged, expand_hostlist, changed=compare, seed="damaged", used=0.1, refused=0.1)


@pytest.mark.parametrize("text", ["a" + "[2-3]" * 10 + "[1]" * 20_000, "a" * 100_000 + "[1-999]"], ids=["[", "a"])
def test_a_short_list_does_not_stand_for_gigabytes(text):
    with pytest.raises(LaunchError, match="names are longer"), processor_time(LIMIT_SECONDS):
        expand_hostlist(text)
