"""How long a step waits for other ranks: DeepSpeed's collectives, timed when they are called and waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pretrain.records.stopwatch import Stopwatch

PART = "communication"
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "inference_all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)


@contextmanager
def timed_collectives(stopwatch: Stopwatch, before_each: Callable[[], None]) -> Iterator[None]:
    """Time every collective that DeepSpeed starts inside, as the part `communication` of `stopwatch`, and call
    `before_each` before each of them.

    On a CPU (gloo) this is the time in blocking calls, in starting the others, and in waiting for them. On CUDA it is
    the time that the computing stream waits: a collective that overlaps with computation on another stream costs
    nothing. A profile (`mor train --profile`) shows the rest of a collective's time. The time is not counted in the
    surrounding part: `forward` and `backward` are computation alone.
    """
    from deepspeed.comm import comm

    backend = comm.cdb
    wrapped = [name for name in _COLLECTIVES if hasattr(backend, name)]
    for name in wrapped:
        setattr(backend, name, _timed(getattr(backend, name), stopwatch, before_each))
    try:
        yield
    finally:
        for name in wrapped:
            delattr(backend, name)


class _TimedWork:
    """A started collective; waiting for it is timed, everything else is passed on."""

    def __init__(self, work: Any, stopwatch: Stopwatch) -> None:
        self._work, self._stopwatch = work, stopwatch

    def wait(self, *arguments: Any, **options: Any) -> Any:
        with self._stopwatch.part(PART):
            return self._work.wait(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(collective: Callable[..., Any], stopwatch: Stopwatch, before_each: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        before_each()
        with stopwatch.part(PART):
            work = collective(*arguments, **options)
        return _TimedWork(work, stopwatch) if hasattr(work, "wait") else work

    return call
