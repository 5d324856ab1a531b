"""Uncertainty of a difference: over the test examples of one run each, and over seeds where there are several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

_TWO_SIDED_95 = 0.975
_Z95 = float(ndtri(_TWO_SIDED_95))


@dataclass(frozen=True)
class Difference:
    """`value` (other minus reference), half-width of its 95 % interval (None where the spread is not known), and what
    the interval covers: `examples` (the test texts) or `seeds`.
    """

    value: float
    half_width: float | None
    over: str

    @property
    def low(self) -> float:
        return self.value - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.half_width or 0.0)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half_width is not None and abs(self.value) > self.half_width


def difference_of_scores(
    value: float, stderr: float | None, reference: float, reference_stderr: float | None
) -> Difference:
    """Difference of two means over examples, taken as independent. Both arms answer the same examples, so their errors
    are correlated and the interval is rather too wide than too narrow.
    """
    half = None if stderr is None or reference_stderr is None else _Z95 * math.hypot(stderr, reference_stderr)
    return Difference(value - reference, half or None, "examples")


def difference_of_pairs(
    values: Sequence[float], references: Sequence[float], weights: Sequence[float] | None = None
) -> Difference:
    """Difference of two ratios sum(values)/sum(weights) and sum(references)/sum(weights), example by example.

    Args:
        values, references: what each example adds to the numerators, in the same order of examples.
        weights: what it adds to the common denominator; ones (a difference of means) when None.

    The interval is that of the ratio estimator (Cochran 1977, "Sampling Techniques", section 6.3), with Student's t.
    """
    if weights is None:
        weights = [1.0] * len(values)
    gaps = [value - reference for value, reference in zip(values, references, strict=True)]
    n, total = len(gaps), sum(weights)
    ratio = sum(gaps) / total
    if n < 2:
        return Difference(ratio, None, "examples")
    residuals = math.hypot(*(gap - ratio * weight for gap, weight in zip(gaps, weights, strict=True)))
    half = float(stdtrit(n - 1, _TWO_SIDED_95)) * residuals * math.sqrt(n / (n - 1)) / total
    # Gaps that are all equal, up to rounding, give no estimate of the spread.
    return Difference(ratio, half if half > 1e-9 * abs(ratio) else None, "examples")


def difference_of_seeds(values: dict[int | None, float], references: dict[int | None, float]) -> Difference | None:
    """Difference of the means over seeds, paired by seed, since two arms of one seed have the same data order.

    Args:
        values, references: seed to score. With fewer than two seeds in common there is no difference: None.
    """
    common = [seed for seed in values if seed in references]
    if len(common) < 2:
        return None
    paired = difference_of_pairs([values[seed] for seed in common], [references[seed] for seed in common])
    return Difference(paired.value, paired.half_width, "seeds")


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` examples (Wilson 1927): sound at 0 and 1 and for few examples, where share plus
    or minus two standard errors is not. (0, 1) without examples, or for a value that is not a share.
    """
    from scipy.stats import binomtest  # takes a second to import

    if n < 1 or not 0 <= share <= 1:
        return 0.0, 1.0
    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n-1); the second is None for a single value. One value that is not finite is not
    averaged away: the mean is not finite either.
    """
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
