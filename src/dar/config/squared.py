"""Specs of the methods that fit log-ratios to rewards by least squares."""

from __future__ import annotations

from typing import ClassVar, Literal

from dar.config.algorithm import AlgorithmSpec, GroupSpec, LoggedKind
from dar.config.base import Count, Positive


class PMDMeanSpec(GroupSpec):
    """Policy mirror descent with the mean reward for log Z (Kimi k1.5, arXiv:2501.12599; arXiv:2602.05933)."""

    type: Literal["pmd_mean"] = "pmd_mean"
    beta: Positive = 0.01
    """τ of the papers, the weight of the KL to π_t, reward units per nat."""
    updates: Count = 2
    """Optimizer steps per batch of rollouts; in the first, the term of π_t has no gradient yet."""


class AStarPOSpec(AlgorithmSpec):
    """A*-PO (arXiv:2505.20686): the optimal advantage, from the column `ref_rewards` of the data's rows."""

    type: Literal["a_star_po"] = "a_star_po"
    beta: Positive = 1e-3
    """β₂ of the paper, the weight of the KL to π₀, reward units per nat."""
    value_beta: Positive = 0.5
    """β₁ of the paper, with which V* is made of a row's `ref_rewards`."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class QRPOSpec(AlgorithmSpec):
    """Quantile reward policy optimization (arXiv:2507.08068) on the data's completions."""

    logged: ClassVar[LoggedKind | None] = "quantiles"

    type: Literal["qrpo"] = "qrpo"
    beta: Positive = 0.1
    """Weight of the KL to π₀, quantiles per nat."""


AnySquared = PMDMeanSpec | AStarPOSpec | QRPOSpec
