"""Specs of flow-matching policies: how a trajectory of denoising steps is sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dar.config.algorithm import ClipHigh
from dar.config.base import Fraction, NotNegative, Positive, Spec
from dar.config.policy_gradient import ClippedGroupSpec


class FlowSDESpec(Spec):
    """How a flow's deterministic path becomes random steps, each with a log-probability."""

    steps: Annotated[int, Field(ge=2)] = 10
    """Denoising steps T, from noise at t = 1 to an image at t = 0."""
    noise: Literal["flow_grpo", "dance_grpo"] = "flow_grpo"
    """σ_t = η √(t/(1−t)) (Flow-GRPO, which takes the next step's t at t = 1), or σ_t = η (DanceGRPO)."""
    eta: Positive = 0.7
    """η, how much noise a step adds."""
    shift: Positive = 1.0
    """Bends the grid: t becomes s t/(1 + (s − 1) t), so that with s > 1 more steps are near the noise."""
    logprob: Literal["mean", "sum"] = "mean"
    """A step's log-probability is the mean over the image's dimensions (what the published clip ranges are for), or
    their sum, the density itself."""


class FlowGRPOSpec(ClippedGroupSpec):
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO with a ratio for every denoising step."""

    type: Literal["flow_grpo"] = "flow_grpo"
    """`flow_grpo`"""
    ratio: Literal["plain", "centered", "normalized"] = "plain"
    """A step's ratio itself; without its mean below 0; or GRPO-Guard's RatioNorm, also of the same spread at any σ."""
    reweight: bool = False
    """Divide each step's loss by its width, as GRPO-Guard does, so that no step's gradient outweighs the others."""
    clip_low: Fraction = 1e-4
    """Lower clip of the ratio, which is of means over dimensions, and so near 1."""
    clip_high: ClipHigh = 1e-4
    """Upper clip of the ratio; `.inf` = none."""
    beta: NotNegative = 0.0
    """Coefficient of the per-step k3 estimate of the KL to π₀; 0 leaves the reference out."""


class GRPOGuardSpec(FlowGRPOSpec):
    """GRPO-Guard (arXiv:2510.22319): Flow-GRPO with normalised ratios and reweighted steps."""

    type: Literal["grpo_guard"] = "grpo_guard"  # pyright: ignore[reportIncompatibleVariableOverride]
    """`grpo_guard`"""
    ratio: Literal["plain", "centered", "normalized"] = "normalized"
    """A step's ratio itself; without its mean below 0; or RatioNorm, also of the same spread at any σ."""
    reweight: bool = True
    """Divide each step's loss by its width, so that no step's gradient outweighs the others."""
