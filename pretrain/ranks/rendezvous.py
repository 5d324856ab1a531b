"""Where ranks meet: the store that the process group starts with, served by rank 0.

`init_process_group(init_method=METHOD)` and DeepSpeed's `init_distributed(init_method=METHOD)` use it once this module
is imported and `prepare_environment` has run.
"""

from __future__ import annotations

import datetime
import errno
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pretrain.errors import MeetingError
from pretrain.ranks.environment import LOOPBACK, Ranks, discover_ranks

METHOD = "mor://"
_AGENT_KEY = "mor/rank 0 listens at"


def open_store(ranks: Ranks, timeout: datetime.timedelta) -> dist.Store:
    """The store that the ranks of this start share. One process alone needs none that listens.

    Raises:
        MeetingError: the port is taken, or rank 0 was not found within the timeout.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return _through_agent(ranks, timeout)
        if ranks.rank == 0:
            return _serve(ranks, ranks.master_address, ranks.master_port, timeout)
        return _join(ranks.master_address, ranks.master_port, timeout)
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise MeetingError(
            f"rank {ranks.rank} cannot reach rank 0 at {ranks.master_address}:{ranks.master_port} ({reason}); check "
            "whether rank 0 has ended, and whether MASTER_ADDR and MASTER_PORT are its host and a port that this host "
            "can reach."
        ) from None


def listen(address: str, port: int, backlog: int) -> socket.socket:
    """A socket where the other ranks reach this host by `address`: at the loopback address, if it is that one, else at
    all interfaces, because other hosts may know this one by another address.

    Raises:
        OSError: the port (0: any that is free) is taken.
    """
    if address in (LOOPBACK, "localhost"):
        return socket.create_server((LOOPBACK, port), backlog=backlog)
    dualstack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dualstack else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dualstack, backlog=backlog)


def _serve(ranks: Ranks, address: str, port: int, timeout: datetime.timedelta) -> dist.TCPStore:
    try:
        listener = listen(address, port, ranks.world_size)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise MeetingError(f"rank 0 cannot listen at port {port}: {error.strerror}.") from None
        raise MeetingError(
            f"port {port} of this host, where the ranks are to meet, is taken by another program; choose a free one: "
            "torchrun --master-port, deepspeed --master_port, or MASTER_PORT, alike on all ranks."
        ) from None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _join(address: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    return dist.TCPStore(address, port, None, False, timeout=timeout, wait_for_workers=False)


def _through_agent(ranks: Ranks, timeout: datetime.timedelta) -> dist.Store:
    """A store of this start alone, found through the store of torchrun's agent. The agent's store outlives a start and
    keeps what earlier ranks wrote: addresses where nobody listens any more.
    """
    agent = _join(ranks.master_address, ranks.master_port, timeout)
    address = LOOPBACK if ranks.local_world_size == ranks.world_size else ranks.master_address
    if ranks.rank == 0:
        store = _serve(ranks, address, 0, timeout)
        agent.set(_AGENT_KEY, str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        told = agent.get(_AGENT_KEY).decode("ascii", "replace")
        port = int(told) if told.isdecimal() and len(told) <= 5 else 0
        try:
            # torch's client would try the port of a start that has ended until its own time is over.
            socket.create_connection((address, port), timeout=20.0).close()
            return _join(address, port, timeout)
        except (OSError, OverflowError):
            time.sleep(0.2)
    raise dist.DistNetworkError("rank 0 did not come there in time")


def _meet(url: str, timeout: datetime.timedelta, **_: Any) -> Iterator[Any]:
    ranks = discover_ranks()
    yield open_store(ranks, timeout), ranks.rank, ranks.world_size


dist.register_rendezvous_handler(METHOD.partition(":")[0], _meet)
