"""Means over layouts with 95 % intervals. A layout is the unit: its regions are not independent."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
Z = 1.96


class Mean(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def errors(self) -> tuple[float, float]:
        """The distances to both ends, as plots want them."""
        return self.value - self.low, self.high - self.value


def mean_of(values: list[float] | np.ndarray, is_fraction: bool = True, weights: list[float] | None = None) -> Mean:
    """The mean over layouts, and a percentile bootstrap over them. Where a fraction is 0 or 1 in every layout, a
    bootstrap has no width: Wilson's interval with n = layouts. NaN values are layouts with nothing to measure; no ends
    are known from one value. weights: how often a layout counts, as by its instances."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    weights, values = weights[~np.isnan(values)], values[~np.isnan(values)]
    if not len(values):
        return Mean(np.nan, np.nan, np.nan)
    mean = (values * weights).sum() / weights.sum()
    if is_fraction and mean in (0, 1):
        return wilson(mean, len(values))
    if len(values) == 1:
        return Mean(float(mean), np.nan, np.nan)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Mean(float(mean), float(low), float(high))


def wilson(fraction: float, count: int) -> Mean:
    """Wilson (1927), equation 4: the interval of a fraction of `count` independent cases."""
    shrink = 1 + Z**2 / count
    center = (fraction + Z**2 / (2 * count)) / shrink
    half = Z / shrink * (fraction * (1 - fraction) / count + Z**2 / (4 * count**2)) ** 0.5
    return Mean(float(fraction), max(0.0, float(center - half)), min(1.0, float(center + half)))
