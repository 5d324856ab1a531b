from __future__ import annotations

import pytest

from pretrain.comparison import numbers


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.si(12_345_678), "12.3 M"),
        (numbers.si(999_999), "1.00 M"),
        (numbers.si(2.0e10, "FLOP/s"), "20.0 GFLOP/s"),
        (numbers.si(19.4e9), "19.4 B"),
        (numbers.si(7), "7.00"),
        (numbers.si(None), "–"),
        (numbers.power_of_ten(49.5e18), "4.95 × 10¹⁹"),
        (numbers.power_of_ten(0.00123), "1.23 × 10⁻³"),
        (numbers.power_of_ten(9.999e5), "1.00 × 10⁶"),
        (numbers.fixed(-0.00001, 3), "0.000"),
        (numbers.fixed(-0.25, 2), "−0.25"),
        (numbers.fixed(49741.96, 1), "49 742"),
        (numbers.fixed(2.5e200), "2.50 × 10²⁰⁰"),
        (numbers.signed(12345.6), "+12 346"),
        (numbers.signed(0.04, 2), "+0.04"),
        (numbers.signed(-0.04, 2), "−0.04"),
        (numbers.signed(0.0001, 2), "0.00"),
        (numbers.plus_minus(1.0, None, 1), "1.0"),
        (numbers.plus_minus(1.0, 0.25, 2), "1.00 ± 0.25"),
        (numbers.percent(0.3333), "33.3 %"),
        (numbers.accuracy(0.5, 0.05), "50.0 ± 5.0"),
        (numbers.accuracy(0.0, 0.0), "0.0"),
        (numbers.gibibytes(3 * 2**29), "1.50 GiB"),
        (numbers.whole(1234567.4), "1 234 567"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written.replace("\u202f", " ").replace("\xa0", " ") == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_said_to_be_so(value):
    written = [numbers.plus_minus(value, 0.1), numbers.signed_plus_minus(value, 0.1), numbers.accuracy(value, 0.1)]
    for name in ("si", "power_of_ten", "fixed", "signed", "percent", "gibibytes", "whole"):
        write = getattr(numbers, name)
        written.append(write(value))
        assert write(None) == "–"
    assert set(written) == {"not finite"}
