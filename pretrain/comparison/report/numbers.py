"""How numbers are written: for people, with the same digits in every table."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MISSING = "–"


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """`12 345 678` as `12.3 M`."""
    if value is None:
        return _MISSING
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / power, digits)} {prefix}{unit}"
    return f"{_significant(value, digits)}{f' {unit}' if unit else ''}"


def power_of_ten(value: float | None, digits: int = 3) -> str:
    """`2.0e15` as `2.00 × 10¹⁵`."""
    if value is None:
        return _MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def fixed(value: float | None, digits: int = 3) -> str:
    """Fixed decimals with a real minus sign."""
    if value is None or math.isnan(value):
        return _MISSING
    if abs(value) >= 10_000:
        return whole(value)
    text = f"{value:.{digits}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text) else text.removeprefix("-")


def signed(value: float | None, digits: int = 3) -> str:
    """As `fixed`, with a plus sign where positive."""
    text = fixed(value, digits)
    return f"+{text}" if value is not None and value > 0 and float(text) > 0 else text


def plus_minus(value: float | None, spread: float | None, digits: int = 3) -> str:
    return (
        fixed(value, digits) if spread is None or value is None else f"{fixed(value, digits)} ± {fixed(spread, digits)}"
    )


def signed_plus_minus(value: float | None, spread: float | None, digits: int = 3) -> str:
    return (
        signed(value, digits)
        if spread is None or value is None
        else f"{signed(value, digits)} ± {fixed(spread, digits)}"
    )


def percent(share: float | None, digits: int = 1) -> str:
    return _MISSING if share is None else f"{fixed(100 * share, digits)} %"


def accuracy(share: float | None, error: float | None) -> str:
    """In per cent, without the sign: a table's heading says it."""
    # All examples right, or all wrong, give a standard error of zero, which is no measure of anything.
    return _MISSING if share is None else plus_minus(100 * share, 100 * error if error else None, 1)


def gibibytes(value: float | None) -> str:
    return _MISSING if value is None else f"{value / 2**30:.2f} GiB"


def duration(seconds: float | None) -> str:
    """`95` as `1 min 35 s`."""
    if seconds is None:
        return _MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:.1f} days"


def whole(value: float | None) -> str:
    """Thousands set apart: `12 345`."""
    return _MISSING if value is None else f"{round(value):,}".replace(",", " ")


def _significant(value: float, digits: int) -> str:
    rounded = float(f"{abs(value):.{digits - 1}e}")  # 0.9996 has the decimals of the 1.00 it is written as
    magnitude = math.floor(math.log10(rounded)) if rounded else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"
