"""Messages between ranks that were changed on the way: what is read is what was sent, or nothing."""

from __future__ import annotations

import random

from pretrain.ranks.rank_messages import BadMessage, Channel, Kind, Message
from tests.fuzz.support import ODD_TEXTS, counts, drive, mutate_bytes

SECRET = bytes(range(32))
WORLD = 8


def conversation(source: random.Random) -> list[Message]:
    kinds = [source.choice(list(Kind)) for _ in range(source.randint(1, 6))]
    return [
        Message(kind, source.randrange(2**40), source.randrange(1000), f"step {number}")
        for number, kind in enumerate(kinds)
    ]


def sealed(messages: list[Message], rank: int = 3, secret: bytes = SECRET) -> list[bytes]:
    channel = Channel(secret, rank, 0, WORLD)
    return [channel.seal(message) for message in messages]


def read(pieces: list[bytes], theirs: int | None = None) -> list[Message]:
    """What rank 0 reads of these pieces until it hears no more."""
    channel, found = Channel(SECRET, 0, theirs, WORLD), []
    try:
        for piece in pieces:
            found += channel.open(piece)
    except BadMessage:
        pass
    return found


def cut(data: bytes, source: random.Random) -> list[bytes]:
    places = sorted(source.randrange(len(data) + 1) for _ in range(source.randrange(4)))
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]


@counts
def test_changed_messages_are_not_heeded(count: int) -> None:
    """In any pieces, with the rank at the other end known or not."""
    sent: list[list[Message]] = []

    def make(source: random.Random) -> tuple[list[bytes], int | None]:
        sent.append(conversation(source))
        data = b"".join(sealed(sent[-1]))
        return cut(data if source.random() < 0.1 else mutate_bytes(data, source), source), source.choice([None, 3])

    def obeyed(given: object, found: list[Message]) -> str | None:
        return None if found == sent[-1][: len(found)] else f"{sent[-1]} became {found}"

    outcome = drive(count, make, lambda given: read(*given), changed=obeyed)
    assert outcome.used == count


@counts
def test_true_messages_at_the_wrong_time_or_place_are_not_heeded(count: int) -> None:
    """Repeated, exchanged, left out, of another rank, to another rank, under another secret."""

    def make(source: random.Random) -> tuple[list[Message], list[bytes]]:
        messages = conversation(source)
        pieces = sealed(messages)
        place = source.randrange(len(pieces))
        others = [message._replace(doing="elsewhere") for message in messages]
        match source.randrange(6):
            case 0:
                pieces.insert(place, source.choice(pieces))
            case 1:
                source.shuffle(pieces)
            case 2:
                del pieces[place]
            case 3:
                pieces[place] = sealed(others, rank=5)[place]
            case 4:
                pieces[place] = sealed(others, secret=bytes(32))[place]
            case 5:
                other = Channel(SECRET, 3, 1, WORLD)
                pieces[place] = [other.seal(message) for message in others][place]
        return messages, pieces

    def obeyed(given: tuple[list[Message], list[bytes]], found: list[Message]) -> str | None:
        return None if found == given[0][: len(found)] else f"{given[0]} became {found}"

    drive(count, make, lambda given: read(given[1], theirs=3), changed=obeyed)


@counts
def test_anything_that_a_rank_does_can_be_told(count: int) -> None:
    """Of any length and in any letters, and what arrives has nothing that a terminal obeys."""

    def make(source: random.Random) -> Message:
        text = "".join(source.choice(ODD_TEXTS) for _ in range(source.randrange(4)))
        return Message(Kind.BEAT, source.choice([0, 1, 2**63]), source.choice([-1, 0, 2**40]), text)

    def use(message: Message) -> list[Message]:
        return read(sealed([message]))

    def unlike(message: Message, found: list[Message]) -> str | None:
        if len(found) != 1 or found[0][:2] != message[:2]:
            return f"became {found}"
        return None if found[0].doing.isprintable() else f"became {found[0].doing!r}"

    assert drive(count, make, use, changed=unlike).used == count
