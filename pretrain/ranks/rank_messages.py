"""What ranks tell one another beside the collectives: short messages of one form, each signed and numbered.

The secret that signs them is dealt out over the process group, so a program that merely finds an open port cannot make
one, and a message cannot be sent twice, to another rank or out of turn. Nothing in a message names a file or a folder.
"""

from __future__ import annotations

import enum
import hmac
import struct
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.plain_text import plain

# Sender, kind, beats, seconds, bytes of text; then the text, then the signature.
_HEAD = struct.Struct("!IBQIB")
_SIGNED_WITH = struct.Struct("!QI")
_SIGNATURE = 32
_LONGEST_TEXT = 200


class Kind(enum.IntEnum):
    """What a message says."""

    BEAT = 1  # how often its sender has moved, and what it does
    STALLED = 2  # to rank 0: its sender has not moved for so many seconds
    END = 3  # from rank 0: all write their stacks and end
    GOODBYE = 4  # its sender leaves in good order


class Message(NamedTuple):
    """One message. `seconds` are whole; `doing` is cut to 200 bytes when it is sent."""

    kind: Kind
    beats: int = 0
    seconds: int = 0
    doing: str = ""


class BadMessage(Exception):
    """Bytes that are no message for this rank, or not its sender's next one."""


class Channel:
    """This rank's end of a connection to one other rank.

    Args:
        secret: what signs the messages, the same at both ends.
        mine: this rank.
        theirs: the rank at the other end; None where its first message is to tell.
        world_size: how many ranks there are.
    """

    def __init__(self, secret: bytes, mine: int, theirs: int | None, world_size: int) -> None:
        self._secret, self._mine, self.theirs, self._world_size = secret, mine, theirs, world_size
        self._sent = self._received = 0
        self._unread = b""

    def seal(self, message: Message) -> bytes:
        """The bytes to send: this rank's next message."""
        assert self.theirs is not None
        text = message.doing.encode("utf-8", "replace")[:_LONGEST_TEXT].decode("utf-8", "ignore").encode()
        seconds = max(0, min(message.seconds, 2**32 - 1))
        body = _HEAD.pack(self._mine, message.kind, message.beats, seconds, len(text)) + text
        signature = self._sign(self._sent, self.theirs, body)
        self._sent += 1
        return body + signature

    def open(self, received: bytes) -> Iterator[Message]:
        """The messages that are complete with these bytes; the rest is kept for the next ones.

        Raises:
            BadMessage: at the first that is not the other rank's next message; nothing more can be read then.
        """
        self._unread += received
        while len(self._unread) >= _HEAD.size:
            sender, kind, beats, seconds, length = _HEAD.unpack_from(self._unread)
            end = _HEAD.size + length
            if length > _LONGEST_TEXT or not self._may_be(sender):
                raise BadMessage
            if len(self._unread) < end + _SIGNATURE:
                return
            body, signature = self._unread[:end], self._unread[end : end + _SIGNATURE]
            if not hmac.compare_digest(signature, self._sign(self._received, self._mine, body)):
                raise BadMessage
            self._unread = self._unread[end + _SIGNATURE :]
            self._received += 1
            self.theirs = sender
            try:
                yield Message(Kind(kind), beats, seconds, plain(body[_HEAD.size :].decode("utf-8")))
            except ValueError:  # another version of this program
                raise BadMessage from None

    def _may_be(self, sender: int) -> bool:
        if self.theirs is not None:
            return sender == self.theirs
        return sender < self._world_size and sender != self._mine

    def _sign(self, number: int, receiver: int, body: bytes) -> bytes:
        return hmac.digest(self._secret, _SIGNED_WITH.pack(number, receiver) + body, "sha256")
