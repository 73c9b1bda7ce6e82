"""Specs of flow-matching policies: where one comes from, how its trajectories are sampled, and its own methods."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from dar.config.algorithm import ClipHigh
from dar.config.base import Count, Fraction, NotNegative, Spec
from dar.config.data import SamplingSpec
from dar.config.model import ModelSourceSpec, ModelSpec
from dar.config.policy_gradient import GRPOSpec

Ratio = Literal["plain", "centered", "normalized"]


class FlowSDESpec(Spec):
    """How a flow's deterministic path becomes random steps, each with a log-probability."""

    steps: Annotated[int, Field(ge=2, le=1000)] = 10
    """Denoising steps T, from noise at t = 1 to an image at t = 0; with one, σ_t would be infinite."""
    noise: Literal["flow_grpo", "dance_grpo"] = "flow_grpo"
    """σ_t = η √(t/(1−t)) (Flow-GRPO, which takes the next step's t at t = 1), or σ_t = η (DanceGRPO)."""
    eta: Annotated[float, Field(gt=0, le=1.4)] = 0.7
    """η, how much noise a step adds; from √2 on, a step from t = 1 would overshoot its own mean."""
    shift: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Bends the grid: t becomes s t/(1 + (s − 1) t), so that with s > 1 more steps are near the noise."""
    logprob: Literal["mean", "sum"] = "mean"
    """A step's log-probability is the mean over the image's D dimensions (what the published clip ranges are for), or
    their sum, the density itself: D times as many nats, for `dar`'s α and every KL, too."""


class FlowModelSpec(ModelSourceSpec):
    """A class-conditional flow-matching model of diffusers, whose prompts are class labels: `"3"`."""

    shorthand = None
    library: ClassVar[str] = "diffusers"
    lora: ClassVar[None] = None
    rank_schedule: ClassVar[None] = None

    type: Literal["flow"]
    path: str
    """A folder that diffusers saved, a run folder of such a policy, a Hub id, or `toy:digits`, which is made once."""
    sde: FlowSDESpec = Field(default_factory=FlowSDESpec)
    """How its trajectories are sampled in training."""


TEXT_ONLY = (
    *("model.sha256", "model.trust_remote_code", "reference.sha256", "reference.trust_remote_code"),
    *("data.wrap_as_user", "data.system_prompt", "data.max_prompt_length", "data.long_prompts"),
    *(f"sampling.{name}" for name in SamplingSpec.model_fields if name != "resample_tied"),
    *("engine.max_cache_tokens", "engine.in_place", "evaluation.top_k", "evaluation.top_p", "optim.null_space"),
    *("runtime.sharding", "runtime.compile_layers"),
)
"""Keys that mean nothing to it."""
ALERTS_OF_TEXT = ("missing_eos", "length_drift", "entropy", "repetition", "retention")

AnyModel = Annotated[
    Annotated[ModelSpec, Tag("text")] | Annotated[FlowModelSpec, Tag("flow")],
    Discriminator(lambda x: "flow" if getattr(x, "type", isinstance(x, dict) and x.get("type")) else "text"),
]


class FlowGRPOSpec(GRPOSpec):
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO with a ratio for every denoising step."""

    type: Literal["flow_grpo"] = "flow_grpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    ratio: Ratio = "plain"
    """A step's ratio itself; without its mean below 0; or GRPO-Guard's RatioNorm, also of the same spread at any σ."""
    reweight: bool = False
    """Divide each step's loss by its width, as GRPO-Guard does, so that no step's gradient outweighs the others."""
    clip_low: Fraction = 1e-4
    """Lower clip of the ratio, which is of means over dimensions, and so near 1."""
    clip_high: ClipHigh = 1e-4
    """Upper clip of the ratio; `.inf` = none."""
    updates: Count = 2
    """Optimizer steps per batch; with one the ratio is 1, and no clip is active."""
    beta: NotNegative = 0.0
    """Coefficient of the per-step k3 estimate of the KL to π₀; 0 leaves the reference out."""


class GRPOGuardSpec(FlowGRPOSpec):
    """GRPO-Guard (arXiv:2510.22319): Flow-GRPO with normalised ratios and reweighted steps."""

    type: Literal["grpo_guard"] = "grpo_guard"  # pyright: ignore[reportIncompatibleVariableOverride]
    ratio: Ratio = "normalized"
    """As for `flow_grpo`."""
    reweight: bool = True
    """As for `flow_grpo`."""


AnyFlow = FlowGRPOSpec | GRPOGuardSpec
