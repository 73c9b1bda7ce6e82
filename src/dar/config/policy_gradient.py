"""Specs of the methods without a critic that follow a policy gradient, or one in the logits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dar.config.algorithm import AlgorithmSpec, ClipHigh, GroupSpec
from dar.config.base import Count, Fraction, NotNegative, Positive


class DAOSpec(AlgorithmSpec):
    """The dual-KL objective by policy gradient instead of regression, the ablation DAR's paper names.

    The paper's formula was not found; this one is derived from its objective (docs/algorithms.md).
    """

    type: Literal["dao"] = "dao"
    alpha: Fraction = 0.1
    """Share of the regularisation that goes to π₀."""
    beta: Positive = 0.05
    """Total KL weight, in reward units (batch standard deviations, when normalised) per nat."""
    normalize: Literal["batch", "none"] = "batch"
    """As for `dar`."""
    ratio_level: Literal["sequence", "token"] = "sequence"
    """One probability ratio per completion (faithful to the objective), or one per token (milder)."""
    updates: Count = 2
    """Optimizer steps per batch; with one, the KL to π_t has no gradient yet."""


class RLOOSpec(GroupSpec):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740); KL to π₀ in the reward."""

    type: Literal["rloo"] = "rloo"
    beta: NotNegative = 0.05
    """Coefficient of the KL to π₀, subtracted from the reward; 0 leaves the reference out."""
    clip_low: Fraction = 0.2
    """Lower clip of the sequence ratio (active from the second update of a batch on)."""
    clip_high: ClipHigh = 0.2
    """Upper clip of the sequence ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class ClippedGroupSpec(GroupSpec):
    """What GRPO and its variants share."""

    clip_low: Fraction = 0.2
    """Lower clip of the token ratio."""
    clip_high: ClipHigh = 0.2
    """Upper clip of the token ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class GRPOSpec(ClippedGroupSpec):
    """Group relative policy optimization as published (Shao et al. 2024, arXiv:2402.03300); KL to π₀ in the loss."""

    type: Literal["grpo"] = "grpo"
    beta: NotNegative = 0.04
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class BNPOSpec(ClippedGroupSpec):
    """GRPO averaged over all tokens of the batch instead of over completions, so that length carries no weight."""

    type: Literal["bnpo"] = "bnpo"
    beta: NotNegative = 0.0
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class DAPOSpec(ClippedGroupSpec):
    """DAPO (Yu et al. 2025, arXiv:2503.14476): a higher upper clip, token mean, no KL, tied groups left out.

    Tied groups carry no weight and do not count in the mean; `sampling.resample_tied` replaces them.
    """

    type: Literal["dapo"] = "dapo"
    clip_high: ClipHigh = 0.28
    """Upper clip of the token ratio; `.inf` = none."""
    overlong_tokens: Count | None = None
    """Soft overlong penalty, falling from 0 to −1 over so many tokens before `sampling.max_completion_length`."""


class DrGRPOSpec(ClippedGroupSpec):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): no division by a group's deviation, nor by a row's own length."""

    type: Literal["dr_grpo"] = "dr_grpo"
    beta: NotNegative = 0.0
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class GSPOSpec(ClippedGroupSpec):
    """Group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071): one length-normalised ratio a row."""

    type: Literal["gspo"] = "gspo"
    clip_low: Fraction = 3e-4
    """Lower clip of the completion's mean ratio; with one update the ratio is 1 and no clip is active."""
    clip_high: ClipHigh = 4e-4
    """Upper clip of the completion's mean ratio; `.inf` = none."""


class BAPOSpec(GroupSpec):
    """Balanced policy optimization with adaptive clipping (arXiv:2510.18927)."""

    type: Literal["bapo"] = "bapo"
    target: Positive = 0.4
    """What the contribution of positive tokens is to reach, as `criterion` measures it."""
    low_start: Positive = 0.6
    """Where the lower bound of the ratio starts."""
    low_end: Positive = 0.9
    """How far it may rise."""
    low_step: Positive = 0.02
    """In what steps."""
    high_start: Positive = 1.2
    """Where the upper bound of the ratio starts."""
    high_end: Positive = 3.0
    """How far it may rise."""
    high_step: Positive = 0.05
    """In what steps."""
    contribution: Literal["surrogate", "gradient"] = "surrogate"
    """What is added up: the surrogate's values (paper and code) or the gradient that is left after clipping."""
    criterion: Literal["share", "ratio"] = "share"
    """Positive tokens against all (paper), or against the negative ones (the authors' code)."""
    order: Literal["high_first", "low_first"] = "high_first"
    """Which bound is moved first: the paper's order, or the code's."""
    updates: Count = 2
    """Optimizer steps per batch of rollouts; with one, the ratio is 1 and no bound is active."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> BAPOSpec:
        if not self.low_start <= self.low_end <= 1 <= self.high_start <= self.high_end:
            raise ValueError("bounds must satisfy low_start ≤ low_end ≤ 1 ≤ high_start ≤ high_end")
        return self


class R2VPOSpec(GroupSpec):
    """Ratio-variance regularized policy optimization (arXiv:2601.03320).

    Abstracts and one third-party implementation were read; dual step and defaults are derived (docs/algorithms.md).
    """

    type: Literal["r2vpo"] = "r2vpo"
    max_variance: Positive = 0.04
    """δ, the bound of E[(ρ − 1)²] per token."""
    penalty: NotNegative = 2.5
    """λ at the start."""
    penalty_rate: NotNegative = 1.0
    """Step size of λ; 0 keeps it as it is."""
    replay: Annotated[int, Field(ge=0)] = 0
    """Earlier batches that are trained on again after each new one, with the log-probabilities of their time."""
    updates: Count = 2
    """Optimizer steps on each new batch."""

    @model_validator(mode="after")
    def _variance_can_grow(self) -> R2VPOSpec:
        if self.updates == 1 and self.replay == 0 and self.penalty_rate > 0:
            raise ValueError(
                "with updates 1 and replay 0 the ratio is always 1 and its variance 0, so the penalty would only fall "
                "to 0: raise updates, or set penalty_rate 0"
            )
        return self


class CISPOSpec(ClippedGroupSpec):
    """Clipped importance weights (MiniMax-M1, arXiv:2506.13585): every token keeps its gradient."""

    type: Literal["cispo"] = "cispo"
    clip_low: Fraction = 1.0
    """A token's weight is its ratio, but at least 1 less this; 1 = no lower bound."""
    clip_high: ClipHigh = 4.0
    """And at most 1 and this; `.inf` = no upper bound."""
    updates: Count = 2
    """Optimizer steps per batch of rollouts; with one, every weight is 1 and this is `bnpo`."""


class DPPOSpec(GroupSpec):
    """Divergence PPO (arXiv:2602.04879): bounds how far a token's probability moves, not its ratio."""

    type: Literal["dppo"] = "dppo"
    max_shift: Fraction = 0.15
    """Change of a token's probability from which on its advantage moves it no further; 1 = none."""
    max_ratio: Annotated[float, Field(ge=1)] = 20.0
    """Largest importance weight of a token; `.inf` = no bound."""
    updates: Count = 2
    """Optimizer steps per batch of rollouts; with one, nothing has moved and this is `bnpo`."""


class MaxRLSpec(ClippedGroupSpec):
    """Maximum likelihood RL (arXiv:2602.02710): the log of the success rate. For rewards of 0 and 1, or others ≥ 0."""

    type: Literal["maxrl"] = "maxrl"


AnyClipped = GRPOSpec | BNPOSpec | DAPOSpec | DrGRPOSpec | GSPOSpec | CISPOSpec | DPPOSpec | MaxRLSpec
AnyPolicyGradient = DAOSpec | RLOOSpec | AnyClipped | BAPOSpec | R2VPOSpec
