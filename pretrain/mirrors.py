"""wandb and TensorBoard show what metrics.jsonl holds; one that fails is left behind, and training goes on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import atomic_write
from pretrain.recipe import Recipe

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
        name = values.get({"validation": "source", "evaluation": "suite"}.get(kind, ""))
        prefix = f"{kind}/{name}" if name else kind
        flat = {f"{prefix}/{name}": value for name, value in _flatten(values) if name != "step"}
        for name, mirror in list(self._open.items()):
            try:
                mirror.show(flat, values["step"])
            except Exception as error:
                self._leave(name, error)

    def close(self) -> None:
        """Finish what the mirrors still have to write."""
        for name, mirror in list(self._open.items()):
            try:
                mirror.close()
            except Exception as error:
                self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        # A full disk, a server that is away, a missing key: each library has its own exceptions for them.
        self._open.pop(name, None)
        self._say(f"{name} fails ({error}); the run goes on without it, and metrics.jsonl holds every record.")


class _TensorBoard:
    def __init__(self, run: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def show(self, flat: Flat, step: int) -> None:
        for name, value in flat.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


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

    def show(self, flat: Flat, step: int) -> None:
        # Steps behind a checkpoint are told again after a restart; wandb keeps the first and would warn of every one.
        if step >= self._run.starting_step:
            self._run.log(flat, step=step)

    def close(self) -> None:
        self._run.finish()


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
