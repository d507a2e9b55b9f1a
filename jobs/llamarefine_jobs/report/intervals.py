"""How sure a measured number is: confidence intervals by a bootstrap over groups.

Rows of one group (one question, one conversation) are not independent, so whole groups are drawn.
A metric is a ratio of two sums over rows: nats per token, credit per pair. One drawing serves every
metric and every model over the same rows, so the difference of two estimates is a paired one.

Axes: G groups, R resamples. Intervals are BCa, bias-corrected and accelerated (Efron 1987,
https://doi.org/10.2307/2289144); a test compares them with scipy's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Span = tuple[float, float]  # the least and the greatest value that a metric can take

_NORMAL = NormalDist()
_ROUNDING = 1e-12  # of sums in fp64


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval; `low` and `high` are None where too few groups allow none."""

    value: float
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1 where the whole interval lies above 0, -1 where below, 0 where it holds 0 or there is none."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Estimate:
    """A value with what it would be on other samples.

    `resampled` (R) is the value of each resample, `without` (G) the value without each group. `span`
    is None for a value without bounds.
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

    def map(self, rising: Callable[[Floats], Floats]) -> "Estimate":
        """This estimate on another scale, by a rising function."""
        return Estimate(float(rising(np.array(self.value))), rising(self.resampled), rising(self.without))

    def interval(self, confidence: float) -> Interval:
        """The interval that holds the true value with `confidence`."""
        groups, tail = len(self.without), (1 - confidence) / 2
        if self.span and self.span[0] == self.span[1]:
            return Interval(self.value, self.value, self.value)  # so by definition
        if not enough_groups(groups, confidence):
            return Interval(self.value, None, None)
        if np.ptp(self.resampled) <= _ROUNDING * max(1.0, abs(self.value)):
            return self._uniform_interval(tail ** (1 / groups))
        low, high = np.quantile(self.resampled, self._bca_levels(tail))
        return Interval(self.value, float(low), float(high))

    def _uniform_interval(self, share: float) -> Interval:
        """The interval where every group says the same, which resampling takes for certainty.

        A `share` of all groups that behaves like these is the least that such a sample leaves
        possible (Clopper-Pearson without a failure); the others may be as different as the span.
        """
        if self.span is None:
            return Interval(self.value, self.value, self.value)
        low, high = (share * self.value + (1 - share) * bound for bound in self.span)
        return Interval(self.value, low, high)

    def _bca_levels(self, tail: float) -> list[float]:
        resamples = len(self.resampled)
        below = np.mean(self.resampled < self.value) + np.mean(self.resampled == self.value) / 2
        bias = _NORMAL.inv_cdf(float(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)))
        pull_G = self.without.mean() - self.without
        spread = float((pull_G**2).sum()) ** 1.5
        acceleration = float((pull_G**3).sum()) / (6 * spread) if spread else 0.0
        shifted = [bias + _NORMAL.inv_cdf(level) for level in (tail, 1 - tail)]
        return [_NORMAL.cdf(bias + z / max(1 - acceleration * z, 0.01)) for z in shifted]


class Bootstrap:
    """One drawing of groups, for all that is measured over the same rows."""

    def __init__(self, groups: Sequence[str], *, resamples: int, seed: int) -> None:
        names, self._group_of_row = np.unique(np.array(groups), return_inverse=True)
        self.groups = len(names)
        drawing = np.random.default_rng(seed).multinomial(self.groups, np.full(self.groups, 1 / self.groups), resamples)
        self._drawn_RG = drawing.astype(np.float64)

    def ratio(self, numerators: Floats, denominators: Floats, span: Span | None = None) -> Estimate:
        """The estimate of sum(numerators) / sum(denominators), both given by row."""
        sums_G2 = np.stack([self._by_group(numerators), self._by_group(denominators)], axis=1)
        total_2, drawn_R2 = sums_G2.sum(axis=0), self._drawn_RG @ sums_G2
        without_G2 = total_2 - sums_G2 if self.groups > 1 else sums_G2
        return Estimate(_quotient(total_2), _quotients(drawn_R2), _quotients(without_G2), span)

    def known(self, value: float) -> Estimate:
        """The estimate of what holds by definition, whatever the rows."""
        return Estimate(value, np.full(len(self._drawn_RG), value), np.full(self.groups, value), (value, value))

    def _by_group(self, values: Floats) -> Floats:
        return np.bincount(self._group_of_row, weights=values, minlength=self.groups).astype(np.float64)


def enough_groups(groups: int, confidence: float) -> bool:
    """Whether `groups` can show anything: did all of them go one way by chance, would that be rare enough?"""
    return bool(2.0 ** (1 - groups) <= 1 - confidence)


def _quotient(sums_2: Floats) -> float:
    return float(sums_2[0] / sums_2[1])


def _quotients(sums_N2: Floats) -> Floats:
    return sums_N2[:, 0] / sums_N2[:, 1]
