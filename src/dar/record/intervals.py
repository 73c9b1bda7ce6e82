"""Intervals of 95 %: Student's for means, Wilson's for shares, the percentile bootstrap for anything of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Z = 1.959963984540054
"""Φ⁻¹(0.975)."""


class Interval(NamedTuple):
    """The bounds of a 95 % interval."""

    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` values; half_width: of its 95 % confidence interval, None for a single value."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class WinShare:
    """A share of `count` cases with its 95 % interval."""

    share: float
    low: float
    high: float
    count: int


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation / √n; 0 for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean ± t_{n−1, 0.975} · s/√n: Student's interval, s with ddof 1.

    Args:
        values: independent ones, at least one.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    count = len(values)
    half = float(student.ppf(0.975, count - 1)) * standard_error(values) if count > 1 else None
    return Estimate(fmean(values), half, count)


def paired_difference(before: Mapping[Hashable, float], after: Mapping[Hashable, float]) -> Estimate | None:
    """`mean_interval` of after − before over the keys both have; None where they share none."""
    shared = [key for key in before if key in after]
    return mean_interval([after[key] - before[key] for key in shared]) if shared else None


def win_share(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> WinShare | None:
    """Share of the keys both have on which ours is the larger, ties as half; None where they share none."""
    wins = [(1.0 + (ours[key] > theirs[key]) - (ours[key] < theirs[key])) / 2 for key in ours if key in theirs]
    return WinShare(fmean(wins), *wilson(fmean(wins), len(wins)), len(wins)) if wins else None


def wilson(share: float, n: int) -> Interval:
    """Wilson's score interval of a share of n independent trials.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    With ties counted as half a success it is a little too wide: a half varies less than a whole.

    Args:
        share: p in [0, 1].
        n: number of trials, ≥ 1.

    Returns:
        Bounds in [0, 1].

    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    center, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return Interval(max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale))


def percent(values: Sequence[float]) -> tuple[float, Interval] | tuple[None, None]:
    """Mean of outcomes in {0, ½, 1} and Wilson's interval, in percent; None where there are none."""
    if not values:
        return None, None
    share = fmean(values)
    return 100 * share, wilson(share, len(values)).scaled(100)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float], n: int, *, resamples: int, seed: int
) -> tuple[Interval, float]:
    """Percentile interval and standard error of a statistic of n pairs, pairs drawn with replacement.

    A pair is drawn whole, both completions and both orders, so the comparison stays paired.

    Args:
        statistic: of the drawn pairs' numbers, [n].
        n: number of pairs.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The 2.5 % and 97.5 % quantiles over the draws, and their standard deviation.

    Efron 1979, doi:10.1214/aos/1176344552.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high)), float(np.std(values, ddof=1))
