"""Before anything is trained, ranks make sure that they are about to do the same thing."""

from __future__ import annotations

import torch.distributed as dist

from pretrain.errors import LaunchError


def require_agreement(mine: dict[str, str]) -> None:
    """Compare named facts over all ranks.

    Raises:
        LaunchError: on every rank alike, naming the ranks that differ from the majority, and in what.
    """
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    problem = find_disagreement(everyone)
    if problem is not None:
        raise LaunchError(problem)


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
