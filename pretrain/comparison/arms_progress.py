"""How far an experiment is: one bar per run and the time the rest will take, read from the runs' own metrics."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from data_prep.plain_text import cell, plain
from pretrain.comparison import numbers
from pretrain.errors import RunError
from pretrain.records.fields import Fields
from pretrain.records.run_folder import RunFolder, parse_record

_PLAIN_SECONDS = 20.0


class Progress:
    """Progress of several runs, whose shares of the whole are their FLOPs.

    On a terminal a bar for the run and one for the experiment; elsewhere a line every twenty seconds.

    Args:
        flops: planned training FLOPs of each run, in the order they are trained.
    """

    def __init__(self, flops: list[float], console: Console) -> None:
        self._flops = flops
        self._console = console
        self._started = time.monotonic()
        self._worked = 0.0
        self._done = 0.0
        self._share = 0.0
        self._first_share: float | None = None
        self._number, self._name, self._steps = -1, "", 1
        self._printed = 0.0
        self._offset = 0
        self._bars = Bars(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("experiment", total=sum(flops), detail="")
        self._one = self._bars.add_task("", total=1, detail="", visible=False)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.update(self._one, visible=False)
        self._bars.stop()

    def begin(self, number: int, name: str, steps: int) -> None:
        """Run `number` is trained from here on."""
        self._number, self._name, self._steps = number, name, steps
        self._offset, self._share, self._first_share = 0, 0.0, None
        title = f"{number + 1}/{len(self._flops)} {name}"
        self._bars.update(
            self._one, description=plain(title), total=steps, completed=0, detail="starting", visible=True
        )
        if not self._console.is_terminal:
            self.say(title)

    def follow(self, run: RunFolder) -> None:
        """Read what the run has logged since the last call."""
        record = self._latest(run)
        if record is None:
            return
        step = record.values["step"]
        self._share = min(1.0, step / self._steps)
        if self._first_share is None:
            # What an earlier invocation trained, and what a branch has from its trunk, costs no time in this one.
            self._first_share = self._share
        detail = _detail(record)
        self._bars.update(self._one, completed=step, detail=detail)
        self._show_whole()
        if not self._console.is_terminal and time.monotonic() - self._printed > _PLAIN_SECONDS:
            self._printed = time.monotonic()
            parts = [f"{self._name}: step {step} of {self._steps}", detail]
            self.say(" · ".join([*parts, remaining] if (remaining := self._remaining()) else parts))

    def activity(self, name: str, text: str) -> None:
        """Say what is going on in run `name` apart from training."""
        self._bars.update(self._one, description=plain(name), completed=self._steps, detail=plain(text), visible=True)
        if not self._console.is_terminal:
            self.say(f"{name}: {text}")

    def refresh(self) -> None:
        """Keep the bars alive while a child works without telling how far it is."""
        self._show_whole()

    def end(self, number: int) -> None:
        """Run `number` is trained; what it had before `begin` was not this process's work."""
        if number == self._number and self._first_share is not None:
            self._worked += (1.0 - self._first_share) * self._flops[number]
        self._done += self._flops[number]
        self._share, self._first_share = 0.0, None
        self._show_whole()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        for line in text.split("\n"):
            self._console.print(cell(line), soft_wrap=True)

    def _show_whole(self) -> None:
        self._bars.update(self._all, completed=self._spent, detail=self._remaining())

    @property
    def _spent(self) -> float:
        return self._done + self._share * self._flops[self._number]

    def _remaining(self) -> str:
        """The estimate for the whole experiment, from the FLOPs that this process has got done since it began."""
        worked = self._worked + (self._share - (self._first_share or 0.0)) * self._flops[self._number]
        if worked <= 0:
            return ""
        seconds = (time.monotonic() - self._started) * (sum(self._flops) - self._spent) / worked
        return f"experiment: about {numbers.duration(seconds)} left"

    def _latest(self, run: RunFolder) -> Fields | None:
        """The newest complete training record after what was read before."""
        try:
            size = run.metrics_file.stat().st_size
            if size < self._offset:
                self._offset = 0  # a resumed run rewrote the file
            with run.metrics_file.open("rb") as stream:
                stream.seek(self._offset)
                text = stream.read()
        except OSError:
            return None
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in reversed(complete.splitlines(keepends=True)):
            record = parse_record(line)
            if record is not None and record["kind"] == "train":
                return Fields(record, run.metrics_file)
        return None


def _detail(record: Fields) -> str:
    """Loss and speed; the report complains of a record that does not have them, training goes on."""
    try:
        loss = record.number("lm_loss", None) if "lm_loss" in record.values else record.number("loss", None)
        return f"loss {numbers.fixed(loss)} · {numbers.whole(record.amount('tokens_per_second', None))} tokens/s"
    except RunError as error:
        return plain(error)
