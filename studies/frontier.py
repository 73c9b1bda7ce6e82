"""Reward at equal drift, and what seeds can say of it: all the statistics of the studies.

Rows are seeds. Two methods are compared seed by seed, on the same prompts and with the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

Array = NDArray[np.float64]
BUDGETS = (1.0, 2.0, 4.0, 8.0)
"""KL to π₀, nats per completion, at which rewards are read."""


def best_within(kls: Sequence[float], rewards: Sequence[float], budgets: Sequence[float]) -> Array:
    """What a run's checkpoints reach within each budget of KL: isotonic in the KL, straight between, flat at the ends.

    Whoever may drift so far may also stop before, hence isotonic, and flat beyond the furthest checkpoint.
    """
    order = np.argsort(kls, kind="stable")
    fitted = isotonic_regression(np.asarray(rewards, float)[order]).x
    return np.interp(budgets, np.asarray(kls, float)[order], fitted)


def at_drift(kls: Sequence[float], rewards: Sequence[float], budgets: Sequence[float]) -> Array:
    """What the checkpoints have at each KL, straight between neighbours in KL: for rewards that may fall again."""
    order = np.argsort(kls, kind="stable")
    return np.interp(budgets, np.asarray(kls, float)[order], np.asarray(rewards, float)[order])


def area(kls: Sequence[float], rewards: Sequence[float], furthest: float = BUDGETS[-1]) -> float:
    """Mean of `best_within` over all budgets from 0 to the furthest: the area under the frontier, in reward units."""
    grid = np.linspace(0, furthest, 161)
    return float(np.trapezoid(best_within(kls, rewards, grid.tolist()), grid) / furthest)


def iqm(values: Array) -> float:
    """Mean of the middle half; values at its ends count in part (Agarwal et al. 2021, arXiv:2108.13264)."""
    ordered, count = np.sort(values), len(values)
    inside = np.clip(np.minimum(np.arange(1, count + 1), 0.75 * count) - np.maximum(np.arange(count), count / 4), 0, 1)
    return float((ordered * inside).sum() / inside.sum())


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def estimate(values: Array, rng: np.random.Generator, draws: int = 2000) -> Estimate:
    """IQM over seeds."""
    found = [iqm(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    return Estimate(iqm(values), *map(float, np.quantile(found, [0.025, 0.975])))


@dataclass(frozen=True)
class Comparison:
    """One method less another, paired by seed.

    difference: mean, reward units. improvement: P(a run of the first is better than a run of the other), ties half.
    p: of the sign-flip test of the mean, two-sided; `adjusted` by Holm over the methods that are compared.
    """

    difference: Estimate
    improvement: Estimate
    p: float
    adjusted: float = 1.0


def compare(first: Array, other: Array, rng: np.random.Generator, draws: int = 2000) -> Comparison:
    """Of two methods' outcomes, [seeds] each, in the same order of seeds."""
    paired, count = first - other, len(first)
    wins = (np.sign(first[:, None] - other[None, :]) + 1) / 2
    means, shares = [], []
    for _ in range(draws):
        rows = rng.integers(count, size=count)
        means.append(paired[rows].mean())
        shares.append(wins[np.ix_(rows, rows)].mean())
    signs = rng.choice([-1.0, 1.0], size=(20 * draws, count))
    beyond = np.abs((signs * paired).mean(1)) >= abs(paired.mean()) - 1e-12
    quantiles = [map(float, np.quantile(found, [0.025, 0.975])) for found in (means, shares)]
    return Comparison(
        Estimate(float(paired.mean()), *quantiles[0]),
        Estimate(float(wins.mean()), *quantiles[1]),
        float((beyond.sum() + 1) / (len(signs) + 1)),
    )


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values times how many are not smaller, none below one before it (Holm 1979)."""
    adjusted, largest = dict[str, float](), 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(p) - rank)))
        adjusted[name] = largest
    return adjusted


def gao(kls: Array, golds: Array) -> tuple[float, float, float]:
    """(a, b, d*) of gold gain = d (a − b log d), d = √KL, by least squares, and the KL at which it is largest, nats.

    Gao et al. 2023, arXiv:2210.10760, the form for RL. d* is infinite where gold never turns (b ≤ 0).
    """
    d = np.sqrt(np.maximum(kls, 1e-9))
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), golds, rcond=None)
    # A peak beyond e^700 nats is none.
    return float(a), float(b), math.exp(min(2 * (a / b - 1), 700.0)) if b > 0 else math.inf
