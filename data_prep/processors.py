"""How many processes are worth starting."""

from __future__ import annotations

import os


def available_processors() -> int:
    """Processors this process may use, which a scheduler or container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
