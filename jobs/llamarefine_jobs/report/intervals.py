"""Confidence intervals of the metrics, by a bootstrap over groups of rows.

Rows of one group (one question, one conversation) are not independent, so the bootstrap resamples whole groups.
A metric is a ratio of two sums over rows: nats per token, credit per pair. All metrics and all models over the same
rows use the same resamples, so the difference of two estimates is a paired difference.

Axes: G groups, R resamples. Intervals are BCa, bias-corrected and accelerated (Efron 1987,
https://doi.org/10.2307/2289144); a test compares them with scipy's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Span = tuple[float, float]  # the smallest and the largest possible value of a metric

_NORMAL = NormalDist()
_ROUNDING = 1e-12  # relative rounding error of sums in fp64


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval; `low` and `high` are None if there are too few groups for an interval."""

    value: float
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below 0, 0 if it contains 0 or if there is no interval."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its values on other samples.

    `resampled` (R) holds the value of each resample, `without` (G) the value without each group. `span`
    is None for a metric without bounds.
    """

    value: float
    resampled: Floats
    without: Floats
    span: Span | None = None

    def __sub__(self, other: "Estimate") -> "Estimate":
        span = None
        if self.span and other.span:
            span = (self.span[0] - other.span[1], self.span[1] - other.span[0])
        return Estimate(
            self.value - other.value,
            self.resampled - other.resampled,
            self.without - other.without,
            span,
        )

    def map(self, increasing: Callable[[Floats], Floats]) -> "Estimate":
        """Return this estimate on another scale, given by an increasing function."""
        return Estimate(float(increasing(np.array(self.value))), increasing(self.resampled), increasing(self.without))

    def interval(self, confidence: float) -> Interval:
        """Return the confidence interval at the level `confidence`, without bounds if there are too few groups."""
        groups, tail = len(self.without), (1 - confidence) / 2
        if self.span and self.span[0] == self.span[1]:
            return Interval(self.value, self.value, self.value)  # the value holds by definition
        if not enough_groups(groups, confidence):
            return Interval(self.value, None, None)
        if np.ptp(self.resampled) <= _ROUNDING * max(1.0, abs(self.value)):
            return self._uniform_interval(tail ** (1 / groups))
        low, high = np.quantile(self.resampled, self._bca_levels(tail))
        return Interval(self.value, float(low), float(high))

    def _uniform_interval(self, share: float) -> Interval:
        """Return the interval if every group has the same value: resampling would give an interval of width 0.

        Such a sample is compatible with a population in which only `share` of the groups behave like these
        (Clopper-Pearson without a failure); the other groups may have any value in the span.
        """
        if self.span is None:
            return Interval(self.value, self.value, self.value)
        low, high = (share * self.value + (1 - share) * bound for bound in self.span)
        return Interval(self.value, low, high)

    def _bca_levels(self, tail: float) -> list[float]:
        resamples = len(self.resampled)
        below = np.mean(self.resampled < self.value) + np.mean(self.resampled == self.value) / 2
        bias = _NORMAL.inv_cdf(float(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)))
        influence_G = self.without.mean() - self.without
        spread = float((influence_G**2).sum()) ** 1.5
        acceleration = float((influence_G**3).sum()) / (6 * spread) if spread else 0.0
        shifted = [bias + _NORMAL.inv_cdf(level) for level in (tail, 1 - tail)]
        return [_NORMAL.cdf(bias + z / max(1 - acceleration * z, 0.01)) for z in shifted]


class Bootstrap:
    """Resamples of the groups, used for all metrics and models over the same rows."""

    def __init__(self, groups: Sequence[str], *, resamples: int, seed: int) -> None:
        names, self._group_of_row = np.unique(np.array(groups), return_inverse=True)
        self.groups = len(names)
        resampled_counts = np.random.default_rng(seed).multinomial(
            self.groups, np.full(self.groups, 1 / self.groups), resamples
        )
        self._counts_RG = resampled_counts.astype(np.float64)

    def ratio(self, numerators: Floats, denominators: Floats, span: Span | None = None) -> Estimate:
        """Return the estimate of sum(numerators) / sum(denominators); both have one value for each row."""
        sums_G2 = np.stack([self._by_group(numerators), self._by_group(denominators)], axis=1)
        total_2, resampled_R2 = sums_G2.sum(axis=0), self._counts_RG @ sums_G2
        without_G2 = total_2 - sums_G2 if self.groups > 1 else sums_G2
        return Estimate(_quotient(total_2), _quotients(resampled_R2), _quotients(without_G2), span)

    def known(self, value: float) -> Estimate:
        """Return the estimate of a value that holds by definition, for any rows."""
        return Estimate(value, np.full(len(self._counts_RG), value), np.full(self.groups, value), (value, value))

    def _by_group(self, values: Floats) -> Floats:
        return np.bincount(self._group_of_row, weights=values, minlength=self.groups).astype(np.float64)


def enough_groups(groups: int, confidence: float) -> bool:
    """Return whether there are enough groups: all agree by chance with a probability of at most 1 - confidence."""
    return bool(2.0 ** (1 - groups) <= 1 - confidence)


def _quotient(sums_2: Floats) -> float:
    return float(sums_2[0] / sums_2[1])


def _quotients(sums_N2: Floats) -> Floats:
    return sums_N2[:, 0] / sums_N2[:, 1]
