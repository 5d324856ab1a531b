"""Ports for what tests start, none of which anybody else can get before it is used."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# Below those that the kernel deals out and those that jobs derive (`pretrain.ranks.environment`): between the choice of
# a port and its use lie the seconds in which a rank imports torch, and every connection made meanwhile takes a port.
_FIRST, _COUNT = 5000, 10_000
# No port twice in one process, and processes begin far apart.
_turns = itertools.count(os.getpid() * 997)


def free_port() -> int:
    """A port of all interfaces that is free."""
    for turn in itertools.islice(_turns, _COUNT):
        port = _FIRST + turn % _COUNT
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"none of the ports {_FIRST} to {_FIRST + _COUNT - 1} is free")
