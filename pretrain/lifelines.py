"""A rank whose process or node is gone is noticed by the others, whatever they wait for.

The kernel closes the connections of a process that ends, and asks a silent node whether it still lives, so a lost
connection is a lost rank: no heartbeat that a busy interpreter could miss. Every rank holds one connection to rank 0.
Collectives on GPUs need not notice by themselves: they wait for a rank that will never come.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import time
from typing import Any

from pretrain.environment import Ranks

_CONNECT_SECONDS = 20.0
_RANK = struct.Struct("!I")
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
        # Programs that try the open ports of a network do not know the word that ranks begin with.
        place: list[Any] = [None, secrets.token_bytes(16)]
        if ranks.rank == 0:
            self._listener = socket.create_server(("", 0), backlog=ranks.world_size + 128)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            place[0] = self._listener.getsockname()[1]
        dist.broadcast_object_list(place, src=0)
        port, self._word = place
        if ranks.rank != 0:
            first = socket.create_connection((ranks.master_address, port), timeout=_CONNECT_SECONDS)
            first.sendall(self._word + _RANK.pack(ranks.rank))
            self._hold(first)

    def lost(self) -> dict[int, float]:
        """Ranks whose connection ended without a goodbye, and how many seconds ago that was noticed. Never waits.

        Rank 0 sees every other rank, and they see rank 0.
        """
        for key, _ in self._selector.select(0):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                with contextlib.suppress(OSError):  # until nobody waits any more
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
        """Hear what a connection says, and note its rank when it ends without a goodbye."""
        try:
            piece = connection.recv(64)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        said = self._said[connection] = self._said[connection] + piece
        rank: int | None = 0
        stranger = False
        if self._rank == 0:
            word, said = said[: len(self._word)], said[len(self._word) :]
            stranger = not self._word.startswith(word)
            rank = _RANK.unpack_from(said)[0] if len(said) >= _RANK.size else None
            said = said[_RANK.size :]
        if piece and not stranger and said != _GOODBYE:
            return
        self._selector.unregister(connection)
        connection.close()
        del self._said[connection]
        if not stranger and rank is not None and said != _GOODBYE:
            self._lost[rank] = time.monotonic()
