"""A rank whose process or node is gone is noticed by the others, whatever they wait for.

The kernel closes the connections of a process that ends, and asks a silent node whether it still lives, so a lost
connection is a lost rank: no heartbeat that a busy interpreter could miss. Every rank holds one connection to rank 0.
Collectives on GPUs need not notice by themselves: they wait for a rank that will never come.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import time
from typing import Any

from pretrain.environment import Ranks

_CONNECT_SECONDS = 20.0
_RANK = struct.Struct("!I")  # what a rank says first
_GOODBYE = b"."
# A node without power says nothing: after so many seconds of silence it is asked, in such distances, so often.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 8), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 4))


class Lifelines:
    """This rank's connections. Made by all ranks together, once the process group exists."""

    def __init__(self, ranks: Ranks) -> None:
        import torch.distributed as dist

        self._rank = ranks.rank
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._said: dict[socket.socket, bytes] = {}
        self._lost: dict[int, float] = {}
        port: list[Any] = [None]
        if ranks.rank == 0:
            self._listener = socket.create_server(("", 0), backlog=ranks.world_size)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            port = [self._listener.getsockname()[1]]
        dist.broadcast_object_list(port, src=0)
        if ranks.rank != 0:
            first = socket.create_connection((ranks.master_address, port[0]), timeout=_CONNECT_SECONDS)
            first.sendall(_RANK.pack(ranks.rank))
            self._hold(first)

    def lost(self) -> dict[int, float]:
        """Ranks whose connection ended without a goodbye, and how many seconds ago that was noticed. Never waits.

        Rank 0 sees every other rank, and they see rank 0.
        """
        for key, _ in self._selector.select(0):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._hold(connection.accept()[0])
            else:
                self._listen(connection)
        now = time.monotonic()
        return {rank: now - since for rank, since in self._lost.items()}

    def close(self, *, goodbye: bool) -> None:
        """End the connections; without a `goodbye` the others take this rank for lost."""
        self.lost()
        for connection in list(self._said):
            if goodbye:
                with contextlib.suppress(OSError):
                    connection.sendall(_GOODBYE)
            connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _hold(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._said[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen(self, connection: socket.socket) -> None:
        ended = False
        try:
            while piece := connection.recv(64):
                self._said[connection] += piece
            ended = True
        except BlockingIOError:
            pass
        except OSError:
            ended = True
        said = self._said[connection]
        words = said[_RANK.size :] if self._rank == 0 else said
        if words == _GOODBYE or ended:
            self._selector.unregister(connection)
            connection.close()
            del self._said[connection]
        # A connection that ends before it has said whose it is was not made by a rank.
        if words != _GOODBYE and ended and (self._rank != 0 or len(said) >= _RANK.size):
            self._lost[_RANK.unpack_from(said)[0] if self._rank == 0 else 0] = time.monotonic()
