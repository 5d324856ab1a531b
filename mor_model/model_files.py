"""JSON and safetensors files of a model from outside; a `ConfigError` names the file that cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mor_model.errors import ConfigError, shown

_LARGEST_JSON = 1 << 26


def read_json(file: Path, again: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        again: how to get a sound file, for the message.

    Raises:
        ConfigError: it is missing, not JSON, no object, nested too deeply, or larger than any file of this kind.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_JSON + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; name a folder with a model in safetensors, or {again}.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from None
    if len(content) > _LARGEST_JSON:
        raise ConfigError(f"{file} holds more than {_LARGEST_JSON:,} bytes, which is no file of this kind; {again}.")
    try:
        values = json.loads(content)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON ({error}); {again}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} does not hold a JSON object; {again}.")
    return values


@contextmanager
def opened_tensors(file: Path, again: str) -> Iterator[Any]:
    """A safetensors file, opened by `safetensors.safe_open`, which refuses tensors larger than the file.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; name a folder with a model in safetensors, or {again}.") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); {again}.") from None


def read_tensors(file: Path, again: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ConfigError: as `opened_tensors`.
    """
    tensors = {}
    with opened_tensors(file, again) as stream:
        for name in stream.keys():  # noqa: SIM118
            try:
                tensors[name] = stream.get_tensor(name)
            except (TypeError, ValueError, RuntimeError):  # an empty one of more rows than can be counted
                raise ConfigError(f"{file}: the tensor {shown(name)} has an impossible shape; {again}.") from None
    return tensors


def plain_name(name: object, where: Path) -> str:
    """A file's name that stands in the file `where`, and names a file beside it.

    Raises:
        ConfigError: for a path, or what is no text.
    """
    if isinstance(name, str) and PurePath(name).name == name != ".." and "\0" not in name:
        with suppress(UnicodeEncodeError):
            if 0 < len(os.fsencode(name)) < 256:  # the limit of file systems
                return name
    raise ConfigError(f"{where}: {shown(name)} is not the name of a file in that folder.")
