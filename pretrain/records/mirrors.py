"""wandb and TensorBoard mirror metrics.jsonl; one that fails is no longer used, and training goes on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import write_text
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
        for name, mirror, wanted in (
            ("TensorBoard", _TensorBoard, recipe.logging.tensorboard),
            ("wandb", _Wandb, recipe.logging.wandb != "disabled"),
        ):
            try:
                if wanted:
                    self._open[name] = mirror(run, recipe)
            except Exception as error:
                self._leave(name, error)

    def show(self, record: dict[str, Any]) -> None:
        """Show one record of metrics.jsonl; records of a source or suite appear under its name."""
        if self._open:
            flat = _flat(record)
            self._each(lambda mirror: mirror.show(flat, record["step"]))

    def rewind(self) -> None:
        """Drop what metrics.jsonl has lost because the run went back to a checkpoint."""
        self._each(lambda mirror: mirror.rewind())

    def flush(self) -> None:
        """Write out what was shown, so that it survives a kill."""
        self._each(lambda mirror: mirror.flush())

    def close(self) -> None:
        """Finish writing."""
        self._each(lambda mirror: mirror.close())

    def _each(self, do: Callable[[Any], None]) -> None:
        for name, mirror in list(self._open.items()):
            try:
                do(mirror)
            except Exception as error:
                self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        # For a full disk, an unreachable server or a missing key each library has its own exceptions.
        self._open.pop(name, None)
        self._say(f"{name} fails ({error}); the run goes on without it, and metrics.jsonl holds every record.")


class _TensorBoard:
    """After a restart or a rewind, records of older files are hidden from the last step in metrics.jsonl on, and those
    that metrics.jsonl still holds from there on are written again.
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
                self.show(_flat(record), record["step"])

    def _records(self) -> Iterator[dict[str, Any]]:
        return self._run.metrics() if self._run.metrics_file.is_file() else iter(())


class _Wandb:
    def __init__(self, run: Path, recipe: Recipe) -> None:
        import wandb

        identity = run / "wandb_id"  # the same after every restart
        if not identity.is_file():
            write_text(identity, secrets.token_hex(4))
        self._run = wandb.init(
            project=recipe.logging.wandb_project,
            name=recipe.name,
            id=identity.read_text(encoding="utf-8").strip(),
            dir=str(run),
            config=recipe.model_dump(mode="json"),
            mode=recipe.logging.wandb,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self._reached = self._run.starting_step

    def show(self, flat: Flat, step: int) -> None:
        # Steps after a checkpoint come again after a restart or rewind; wandb keeps the first and would warn of each.
        if step >= self._reached:
            self._run.log(flat, step=step)
            self._reached = step

    def rewind(self) -> None:
        """wandb cannot remove records."""

    def flush(self) -> None:
        """wandb's own process writes at once."""

    def close(self) -> None:
        self._run.finish()


def _flat(record: dict[str, Any]) -> Flat:
    prefix = kind = record["kind"]
    if name := record.get({"validation": "source", "evaluation": "suite"}.get(kind, "")):
        prefix = f"{kind}/{name}"
    return {f"{prefix}/{name}": value for name, value in _flatten(record) if name != "step"}


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
