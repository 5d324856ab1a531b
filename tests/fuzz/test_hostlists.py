"""Host lists: expanded as an obvious program expands them, or refused."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from pretrain.ranks.hostlist import expand_hostlist
from tests.fuzz.support import counts, drive, mutate_text


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
@pytest.mark.parametrize(("damage", "used", "refused"), [(lambda text, _: text, 0.7, 0.0), (mutate_text, 0.1, 0.1)])
def test_host_lists_are_written_out_or_refused(count, damage, used, refused):
    def make(source: random.Random) -> str:
        return damage(written(source), source)

    drive(count, make, expand_hostlist, changed=compare, used=used, refused=refused)
