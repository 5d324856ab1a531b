"""Where ranks meet: on the port they are told, on none alone, and anew at each start of torchrun's."""

from __future__ import annotations

import datetime
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.errors import MeetingError
from pretrain.ranks.environment import Ranks
from pretrain.ranks.rendezvous import open_store
from pretrain.ranks.signals import EXIT_FAILED
from tests.ports import free_port
from tests.pretrain.support import Job, Nursery, recipe_values, write_recipe

MINUTE = datetime.timedelta(seconds=60)


def rank_of_two(rank: int, port: int, host: str = "127.0.0.1") -> Ranks:
    return Ranks(rank, 2, rank, 2, rank, host, port, "environment")


def test_a_taken_port_is_named_and_one_process_alone_needs_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MeetingError, match=f"port {port} .* is taken .* MASTER_PORT"):
            open_store(rank_of_two(0, port), MINUTE)
        store = open_store(Ranks(0, 1, 0, 1, 0, "127.0.0.1", port, "python"), MINUTE)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_a_run_whose_port_is_taken_ends_with_a_sentence_and_may_be_started_again(
    tmp_path: Path, tiny_data: Path, nursery: Nursery
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        codes, printed, errors = Job(recipe, extra=place, nursery=nursery).wait()
    assert codes == [EXIT_FAILED] and f"train: port {port} of this host" in errors, printed + errors
    assert "Traceback" not in printed + errors


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_of_one_host_meet_where_no_other_host_comes(torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under torchrun, whose agent gives this host another name than localhost."""
    port, host = free_port(), "127.0.0.1"
    if torchrun:
        agent = dist.TCPStore(host, 0, None, True, timeout=MINUTE, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        port, host = agent.port, "127.0.0.2"
    first = open_store(rank_of_two(0, port, host), MINUTE)
    other = open_store(rank_of_two(1, port, host), MINUTE)
    first.set("key", "value")
    assert other.get("key") == b"value"
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.2", first.port), timeout=60)


def test_a_restart_finds_nothing_of_the_start_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent keeps one store for all starts; rank 1 of the second start comes there before rank 0."""
    agent = dist.TCPStore("127.0.0.1", 0, None, True, timeout=MINUTE, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first, other = rank_of_two(0, agent.port), rank_of_two(1, agent.port)
    stores = [open_store(first, MINUTE), open_store(other, MINUTE)]
    stores[0].set("address of rank 0", "where nobody listens any more")
    assert stores[1].get("address of rank 0")
    stores.clear()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(open_store, other, MINUTE)
        again = open_store(first, MINUTE)
        assert not early.result(60).check(["address of rank 0"])
        again.set("key", "of this start")
        assert early.result().get("key") == b"of this start"


def test_a_store_that_does_not_answer_is_an_error_in_a_sentence() -> None:
    with pytest.raises(MeetingError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1:"):
        open_store(rank_of_two(1, free_port()), datetime.timedelta(seconds=0.2))
