"""Specs of the methods with a critic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dar.config.algorithm import AlgorithmSpec, ClipHigh
from dar.config.base import Count, Fraction, NotNegative, Positive


class ActorCriticSpec(AlgorithmSpec):
    """What PPO and dual PPO share."""

    clip_low: Fraction = 0.2
    """Lower clip of the token ratio."""
    clip_high: ClipHigh = 0.2
    """Upper clip of the token ratio; `.inf` = none."""
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """λ of the generalised advantage estimate."""
    critic: Literal["head", "model"] = "head"
    """A linear value head on the policy's own states, or a model of its own: a copy of π₀'s layers with such a head."""
    value_coef: Positive = 0.1
    """Factor of the critic's loss."""
    clip_value: Annotated[float, Field(gt=0)] = 0.2
    """How far a value may move from its old one before its loss stops counting; `.inf` = any."""
    updates: Count = 4
    """Optimizer steps per batch of rollouts."""


class PPOSpec(ActorCriticSpec):
    """Proximal policy optimization with a critic (Schulman et al. 2017, arXiv:1707.06347); KL to π₀ in the reward."""

    type: Literal["ppo"] = "ppo"
    kl_coef: NotNegative = 0.05
    """Coefficient of the per-token KL to π₀ in the reward; 0 leaves the reference out."""


class DualPPOSpec(ActorCriticSpec):
    """PPO with both KL terms of DAR's objective: to π₀ in the reward, to π_t in the loss.

    The ablation DAR's paper names; the formula is derived (docs/algorithms.md).
    """

    type: Literal["dual_ppo"] = "dual_ppo"
    alpha: Fraction = 0.1
    """Share of the regularisation that goes to π₀."""
    beta: Positive = 0.05
    """Total KL weight, reward units per nat."""


AnyActorCritic = PPOSpec | DualPPOSpec
