"""DeepSpeed configurations, one plain JSON file each, to be named in a recipe (`deepspeed: {config: zero3}`) or passed
by hand.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """What a recipe can name."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def path(name: str) -> Path:
    """The file of one of `names()`."""
    return _FOLDER / f"{name}.json"
