"""How numbers are written. One that was not measured is a dash, one that is not finite is "not finite"."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"
NOT_FINITE = "not finite"
Options = ParamSpec("Options")


def _number(write: Callable[Concatenate[float, Options], str]) -> Callable[Concatenate[float | None, Options], str]:
    """Extend `write`, which takes finite numbers, to None and to values that are not finite."""

    @functools.wraps(write)
    def written(value: float | None, *args: Options.args, **kwargs: Options.kwargs) -> str:
        if value is None:
            return MISSING
        return write(value, *args, **kwargs) if math.isfinite(value) else NOT_FINITE

    return written


@_number
def si(value: float, unit: str = "", digits: int = 3) -> str:
    """`12 345 678` as `12.3 M`."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / power, digits)} {prefix}{unit}"
    return f"{_significant(value, digits)}{f' {unit}' if unit else ''}"


@_number
def power_of_ten(value: float, digits: int = 3) -> str:
    """`2.0e15` as `2.00 × 10¹⁵`."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


@_number
def fixed(value: float, digits: int = 3) -> str:
    """Fixed decimals with a real minus sign; large numbers have no decimals, and huge ones are powers of ten."""
    if abs(value) >= 1e15:
        return power_of_ten(value)
    if abs(value) >= 10_000:
        return whole(value)
    text = f"{value:.{digits}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text) else text.removeprefix("-")


@_number
def signed(value: float, digits: int = 3) -> str:
    """As `fixed`, with a plus sign where positive."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def plus_minus(value: float | None, spread: float | None, digits: int = 3) -> str:
    return _with_spread(fixed(value, digits), value, spread, digits)


def signed_plus_minus(value: float | None, spread: float | None, digits: int = 3) -> str:
    return _with_spread(signed(value, digits), value, spread, digits)


def _with_spread(text: str, value: float | None, spread: float | None, digits: int) -> str:
    known = spread is not None and value is not None and math.isfinite(value)
    return f"{text} ± {fixed(spread, digits)}" if known else text


@_number
def percent(share: float, digits: int = 1) -> str:
    return f"{fixed(100 * share, digits)} %"


def accuracy(share: float | None, error: float | None) -> str:
    """In per cent, without the sign."""
    # All examples right, or all wrong, give a standard error of zero, which measures nothing.
    return plus_minus(None if share is None else 100 * share, 100 * error if error else None, 1)


@_number
def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


@_number
def whole(value: float) -> str:
    """Thousands set apart: `12 345`."""
    return f"{round(value):,}".replace(",", " ")


def _significant(value: float, digits: int) -> str:
    rounded = float(f"{abs(value):.{digits - 1}e}")  # 0.9996 has the decimals of the 1.00 it is written as
    magnitude = math.floor(math.log10(rounded)) if rounded else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"
