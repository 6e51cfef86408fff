"""95 % intervals: Wilson's for proportions, the percentile bootstrap for other means.

Wilson, "Probable inference, the law of succession, and statistical inference" (1927), without
continuity correction; Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile
RESAMPLES = 2000


class Interval(NamedTuple):
    """A point estimate with the ends of its 95 % interval, all in the unit of the data."""

    value: float
    low: float
    high: float


def wilson(k: int, n: int) -> Interval:
    """Proportion k / n and its Wilson score interval, all in [0, 1].

    Stays informative at the ends: 0 of n has low 0 and high z^2 / (n + z^2).
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    p = k / n
    shrink = 1 + Z_95**2 / n
    centre = (p + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return Interval(p, low, high)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of `values` and its percentile bootstrap interval over RESAMPLES resamples.

    Equal values, and so a single one, give an interval of no width: it says nothing of a population
    then. Raises ValueError for no values or any that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)  # (n,)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"bootstrap_mean needs finite numbers, got {values}")
    random = np.random.default_rng(seed)
    means = [data[random.integers(0, data.size, data.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))


def relative_change(before: Sequence[int], after: Sequence[int], seed: int = 0) -> Interval | None:
    """Change of the sum in %, 100 (sum after / sum before - 1); None where there was nothing.

    The i-th counts are of the same prompt and seed, so the percentile bootstrap draws pairs.
    """
    pairs = np.array([before, after], dtype=np.float64)  # (2, n)
    if not pairs[0].sum():
        return None
    random = np.random.default_rng(seed)
    count = pairs.shape[1]
    sums = np.stack([pairs[:, random.integers(0, count, count)].sum(1) for _ in range(RESAMPLES)])
    sums = sums[sums[:, 0] > 0]  # (resamples, 2)
    low, high = np.quantile(100 * (sums[:, 1] / sums[:, 0] - 1), (0.025, 0.975))
    return Interval(100 * (pairs[1].sum() / pairs[0].sum() - 1), float(low), float(high))


def bootstrap_standard(
    statistic: Callable[[NDArray[np.intp]], float], n: int, resamples: int, seed: int = 0
) -> Interval:
    """`statistic` of n items, +- 1.96 standard deviations of it over resamples of the items.

    The bootstrap's standard interval (Efron and Tibshirani, ch. 6 and 12), for what is too costly
    to resample thousands of times, or biased by resampling itself: 25 resamples give a usable
    standard error (ch. 6.4). `statistic` takes indices (n,) in [0, n), with repetitions.
    """
    random = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    drawn = [statistic(random.integers(0, n, n)) for _ in range(resamples)]
    half = Z_95 * float(np.std(drawn, ddof=1))
    return Interval(value, value - half, value + half)
