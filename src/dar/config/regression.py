"""Specs of weighted regression, on own samples and on logged ones."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dar.config.algorithm import AlgorithmSpec, GroupSpec, LoggedKind
from dar.config.base import Count, Fraction, Positive, Spec


class TargetKLSpec(Spec):
    """Choose β each step so that the regression's target is a stated KL away from π_t."""

    target_kl: Positive
    """KL(target‖π_t) over the batch, nats per completion."""


class TargetESSSpec(Spec):
    """Choose β each step so that the weights have a stated effective sample size."""

    target_ess: Annotated[float, Field(gt=0, lt=1)]
    """ESS / number of completions, of the weights before clipping."""


def _beta_kind(value: Any) -> str:
    """Which of the three ways to give β is meant, so that a mistake is explained once."""
    if isinstance(value, TargetESSSpec) or (isinstance(value, dict) and "target_ess" in value and len(value) == 1):
        return "target_ess"
    return "target_kl" if isinstance(value, TargetKLSpec | dict) else "number"


Beta = Annotated[
    Annotated[Positive, Tag("number")]
    | Annotated[TargetKLSpec, Tag("target_kl")]
    | Annotated[TargetESSSpec, Tag("target_ess")],
    Discriminator(_beta_kind),
]


class DARSpec(AlgorithmSpec):
    """Dual-regularized Advantage Regression (He et al. 2026, arXiv:2602.11523)."""

    type: Literal["dar"] = "dar"
    alpha: Fraction = 0.1
    """Share of the regularisation that goes to the initial model π₀; the rest goes to the current policy π_t."""
    beta: Beta = 0.05
    """Total KL weight, in reward units (batch standard deviations, when normalised) per nat; or a mapping with
    `target_kl` or `target_ess`, which has it chosen each step."""
    w_clip: Annotated[float, Field(gt=0)] = 20.0
    """Upper bound of the product w_reg · w_adv; `.inf` turns clipping off."""
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """Monte-Carlo baseline. With one completion per prompt the group mean is left out and the batch mean serves."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide advantages by their standard deviation over the global batch (and centre them), or leave them."""
    weight_scale: Literal["none", "clip", "mean"] = "none"
    """Divide weights by nothing (the paper), by `w_clip`, or by their mean over the global batch."""
    normalize_weights: Literal["none", "group"] = "none"
    """`group`: fit the policy's shares of a prompt's completions to its weights, pushing those down that have more."""
    center_weights: bool = False
    """Subtract the weights' mean over the global batch, after clipping and scaling. With one update per batch only."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts; weights stay those of π_t."""

    @model_validator(mode="after")
    def _consistent(self) -> DARSpec:
        if self.weight_scale == "clip" and math.isinf(self.w_clip):
            raise ValueError("weight_scale is 'clip', but w_clip is infinite: there is nothing to divide by")
        is_other = self.weight_scale != "none" or self.center_weights or not isinstance(self.beta, float | int)
        if self.normalize_weights == "group" and is_other:
            others = "weight_scale, center_weights, and a beta with a target (which the batch as a whole would meet)"
            raise ValueError(f"normalize_weights 'group' scales and centres in each prompt's group: leave out {others}")
        if self.center_weights and self.updates > 1:
            why = "from the second on the loss pushes away from π_t without bound; normalize_weights 'group' does not"
            raise ValueError(f"center_weights is for one update per batch, not {self.updates}: {why}")
        return self

    @classmethod
    def from_2025(cls, *, alpha_25: float, beta_25: float, **others: Any) -> DARSpec:
        """The spec from the letters of the 2025 paper, where each KL has a coefficient of its own.

            J = E[A] − α₂₅ KL[π_θ‖π₀] − β₂₅ KL[π_θ‖π_t]   ⇔   β = α₂₅ + β₂₅,  α = α₂₅ / (α₂₅ + β₂₅)

        Args:
            alpha_25: coefficient of the KL to π₀, reward units per nat, ≥ 0.
            beta_25: coefficient of the KL to π_t, reward units per nat, ≥ 0.
            others: further fields of the spec.

        Raises:
            ValueError: a coefficient is negative, or both are 0.

        He et al. 2025, arXiv:2504.14177. Its default 0.005 and 0.045 is α = 0.1, β = 0.05 here.
        """
        if alpha_25 < 0 or beta_25 < 0 or alpha_25 + beta_25 <= 0:
            raise ValueError(f"coefficients must be ≥ 0 and not both 0, got {alpha_25} and {beta_25}")
        # 0.005 + 0.045 is 0.049999999999999996 in binary; the digits that were written are the ones that are meant.
        total = float(f"{alpha_25 + beta_25:.15g}")
        return cls(alpha=alpha_25 / total, beta=total, **others)


class AWRSpec(AlgorithmSpec):
    """Advantage-weighted regression, on-policy with a Monte-Carlo baseline (Peng et al. 2019, arXiv:1910.00177).

    DAR without the regularisation towards π₀ (α = 0).
    """

    type: Literal["awr"] = "awr"
    beta: Beta = 0.05
    """Temperature of the weights, in reward units (batch standard deviations, when normalised); or as for `dar`."""
    w_clip: Annotated[float, Field(gt=0)] = 20.0
    """Upper bound of the weight; `.inf` turns clipping off."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide advantages by their standard deviation over the global batch (and centre them), or leave them."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class BestOfNSpec(GroupSpec):
    """Supervised fine-tuning on the best of each prompt's completions, the first of equals."""

    type: Literal["best_of_n"] = "best_of_n"
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class TPOSpec(GroupSpec):
    """Target Policy Optimization (Kaddour 2026, arXiv:2604.06159), over the completions of each prompt."""

    type: Literal["tpo"] = "tpo"
    temperature: Positive = 1.0
    """η of the target p_old · exp(u/η), u being rewards in standard deviations of their group."""
    score: Literal["mean", "sum"] = "mean"
    """What stands for log π(y): the mean over its tokens, or their sum (the paper), which falls with length."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts; the target stays that of π_t."""


class SFTSpec(AlgorithmSpec):
    """Supervised fine-tuning on the completions of the data."""

    logged: ClassVar[LoggedKind | None] = "demonstrations"

    type: Literal["sft"] = "sft"


class VARSpec(AlgorithmSpec):
    """Variational alignment with re-weighting (arXiv:2502.11026): reward-labelled completions, weighted."""

    logged: ClassVar[LoggedKind | None] = "rewards"

    type: Literal["var"] = "var"
    temperature: Positive = 1.0
    """λ of the weights K · softmax(r/λ), in standard deviations of the batch's rewards when normalised."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide rewards by their standard deviation over the batch (and centre them), or leave them."""


AnyRegression = DARSpec | AWRSpec | BestOfNSpec | TPOSpec | SFTSpec | VARSpec
