"""wandb and TensorBoard show what metrics.jsonl holds; one that fails is left behind, and training goes on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import atomic_write
from pretrain.recipe.recipe import Recipe
from pretrain.records.run_folder import RunFolder

Flat = dict[str, float]


class Mirrors:
    """The mirrors that a recipe asks for.

    Args:
        run: the run folder, where wandb's offline files and TensorBoard's lie.
        say: tells a person that a mirror has failed.
    """

    def __init__(self, run: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Any] = {}
        wanted = {"TensorBoard": recipe.logging.tensorboard, "wandb": recipe.logging.wandb != "disabled"}
        opening = {"TensorBoard": _TensorBoard, "wandb": _Wandb}
        for name in (name for name, asked in wanted.items() if asked):
            try:
                self._open[name] = opening[name](run, recipe)
            except Exception as error:
                self._leave(name, error)

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One record, as metrics.jsonl has it; of a source or suite under its name."""
        if not self._open:
            return
        flat = _flat(kind, values)
        self._each(lambda mirror: mirror.show(flat, values["step"]))

    def rewind(self) -> None:
        """The run went back to a checkpoint: metrics.jsonl has lost what came after it, and so do the mirrors."""
        self._each(lambda mirror: mirror.rewind())

    def flush(self) -> None:
        """What was shown is there even if the process is killed now."""
        self._each(lambda mirror: mirror.flush())

    def close(self) -> None:
        """Finish what the mirrors still have to write."""
        self._each(lambda mirror: mirror.close())

    def _each(self, do: Callable[[Any], None]) -> None:
        for name, mirror in list(self._open.items()):
            try:
                do(mirror)
            except Exception as error:
                self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        # A full disk, a server that is away, a missing key: each library has its own exceptions for them.
        self._open.pop(name, None)
        self._say(f"{name} fails ({error}); the run goes on without it, and metrics.jsonl holds every record.")


class _TensorBoard:
    """After a restart or a rewind, the older files' records are hidden from the last step in metrics.jsonl on; those
    that metrics.jsonl still has are written again.
    """

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self._run = RunFolder(run)
        self._folder = run / "tensorboard"
        self._begin()

    def show(self, flat: Flat, step: int) -> None:
        for name, value in flat.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self) -> None:
        self._writer.close()
        self._begin()

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not any(self._folder.glob("events.*")):
            self._writer = SummaryWriter(str(self._folder))
            return
        last = max((record["step"] for record in self._records() if record["kind"] != "event"), default=0)
        self._writer = SummaryWriter(str(self._folder), purge_step=last)
        for record in self._records():
            if record["step"] >= last:
                values = {name: value for name, value in record.items() if name != "kind"}
                self.show(_flat(record["kind"], values), record["step"])

    def _records(self) -> Iterator[dict[str, Any]]:
        return self._run.metrics() if self._run.metrics_file.is_file() else iter(())


class _Wandb:
    def __init__(self, run: Path, recipe: Recipe) -> None:
        import wandb

        self._run = wandb.init(
            project=recipe.logging.wandb_project,
            name=recipe.name,
            id=_wandb_id(run / "wandb_id"),
            dir=str(run),
            config=recipe.model_dump(mode="json"),
            mode=recipe.logging.wandb,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self._reached = self._run.starting_step

    def show(self, flat: Flat, step: int) -> None:
        # Steps behind a checkpoint are told again after a restart or rewind; wandb keeps the first and would warn of
        # every one.
        if step >= self._reached:
            self._run.log(flat, step=step)
            self._reached = step

    def rewind(self) -> None:
        """wandb cannot take back what it was told."""

    def flush(self) -> None:
        """Its own process writes without delay."""

    def close(self) -> None:
        self._run.finish()


def _flat(kind: str, values: dict[str, Any]) -> Flat:
    name = values.get({"validation": "source", "evaluation": "suite"}.get(kind, ""))
    prefix = f"{kind}/{name}" if name else kind
    return {f"{prefix}/{name}": value for name, value in _flatten(values) if name != "step"}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, (int, float)):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
            yield from ((f"{prefix}{name}/{index + 1}", item) for index, item in enumerate(value))


def _wandb_id(file: Path) -> str:
    """The id this run has in wandb, the same after every restart."""
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    new = secrets.token_hex(4)
    with atomic_write(file, "w") as stream:
        stream.write(new)
    return new
