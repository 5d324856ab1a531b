"""Ranks compare what they are about to do before anything is trained, and share what one of them does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data_prep.errors import DataError
from mor_model.errors import ConfigError
from pretrain.errors import LaunchError, RunError, UserError

_Answer = TypeVar("_Answer")


def gather(mine: Any) -> list[Any]:
    """What every rank has, in the order of ranks. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def require_agreement(mine: dict[str, str]) -> None:
    """Compare named facts over all ranks. Collective.

    Raises:
        LaunchError: on every rank alike, naming the ranks that differ from the majority, and in what.
    """
    problem = find_disagreement(gather(mine))
    if problem is not None:
        raise LaunchError(problem)


def on_first_rank(action: Callable[[], _Answer]) -> _Answer:
    """Run an action on rank 0 alone; every rank gets its result. Collective; without a process group it just runs.

    Raises:
        RunError: on every rank alike, when the action raises an error with a message for a person or an OSError.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except (UserError, DataError, ConfigError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RunError(outcome[1])
    return outcome[0]


def find_disagreement(everyone: list[dict[str, str]]) -> str | None:
    """What differs between ranks, as a sentence, or None. A fact that only some ranks have differs too."""
    for name in dict.fromkeys(key for facts in everyone for key in facts):
        values = [facts.get(name, "absent") for facts in everyone]
        if len(set(values)) == 1:
            continue
        usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
        odd = [(rank, value) for rank, value in enumerate(values) if value != usual]
        named = ", ".join(f"rank {rank} has {value}" for rank, value in odd[:4])
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        return (
            f"The ranks do not agree on {name}: {named}{more}, the others have {usual}; "
            "start all ranks from the same files."
        )
    return None
