"""Specs of flow-matching policies: how a trajectory of denoising steps is sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dar.config.base import Positive, Spec


class FlowSDESpec(Spec):
    """How a flow's deterministic path becomes random steps, each with a log-probability."""

    steps: Annotated[int, Field(ge=2)] = 10
    """Denoising steps T, from noise at t = 1 to an image at t = 0."""
    noise: Literal["flow_grpo", "dance_grpo"] = "flow_grpo"
    """σ_t = η √(t/(1−t)) (Flow-GRPO, which takes the next step's t at t = 1), or σ_t = η (DanceGRPO)."""
    eta: Positive = 0.7
    """η, how much noise a step adds."""
    logprob: Literal["mean", "sum"] = "mean"
    """A step's log-probability is the mean over the image's dimensions (what the published clip ranges are for), or
    their sum, the density itself."""
