"""One bar a suite, with the time that is left; nothing where no one is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_prep.plain_text import plain
from pretrain.evaluation.evaluate import SuiteProgress
from pretrain.evaluation.likelihood import Progress


@contextmanager
def suite_progress(title: str, wanted: bool = True) -> Iterator[SuiteProgress | None]:
    """Yields what `evaluate_run` takes as `progress`; None when not wanted or standard error is not a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(file=sys.stderr), transient=True) as bars:

        def begin(suite: str) -> Progress:
            bar = bars.add_task(plain(f"{title}: {suite}"), total=None)

            def advance(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total)

            return advance

        yield begin
