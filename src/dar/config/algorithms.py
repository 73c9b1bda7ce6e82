"""Specs of the algorithms, one per `type`."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from dar.config.base import Count, Fraction, NotNegative, Positive, Spec, unknown_key_message

ClipHigh = Annotated[float, Field(ge=0)]


class AlgorithmSpec(Spec):
    """Base of the algorithms' specs: `type` says which."""

    shorthand: ClassVar[str | None] = "type"
    needs_group: ClassVar[bool] = False
    """Whether the method compares the completions of one prompt, and so needs at least two."""
    is_offline: ClassVar[bool] = False
    """Whether the method learns from completions that come with the data, and samples none."""

    @model_validator(mode="before")
    @classmethod
    def _expand_and_check_keys(cls, value: Any) -> Any:
        """Names the methods that do have an option this one has not."""
        if isinstance(value, dict):
            method = str(value.get("type", cls.model_fields["type"].default))
            problems = []
            for key in value:
                if key not in cls.model_fields:
                    owners = [name for name, spec in ALGORITHM_SPECS.items() if key in spec.model_fields]
                    if owners:
                        problems.append(f"{method} has no {key}; these methods do: {', '.join(owners)}")
                    else:
                        problems.append(unknown_key_message(key, list(cls.model_fields)))
            if problems:
                raise ValueError("; ".join(problems))
        return value


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
    """`dar`"""
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
    updates: Count = 1
    """Optimizer steps per batch of rollouts; weights stay those of π_t."""

    @model_validator(mode="after")
    def _finite_scale(self) -> DARSpec:
        if self.weight_scale == "clip" and math.isinf(self.w_clip):
            raise ValueError("weight_scale is 'clip', but w_clip is infinite: there is nothing to divide by")
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
    """`awr`"""
    beta: Beta = 0.05
    """Temperature of the weights, in reward units (batch standard deviations, when normalised); or as for `dar`."""
    w_clip: Annotated[float, Field(gt=0)] = 20.0
    """Upper bound of the weight; `.inf` turns clipping off."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide advantages by their standard deviation over the global batch (and centre them), or leave them."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class BestOfNSpec(AlgorithmSpec):
    """Supervised fine-tuning on the best of each prompt's completions, the first of equals."""

    needs_group: ClassVar[bool] = True

    type: Literal["best_of_n"] = "best_of_n"
    """`best_of_n`"""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class DAOSpec(AlgorithmSpec):
    """The dual-KL objective by policy gradient instead of regression, the ablation DAR's paper names.

    The paper's formula was not found; this one is derived from its objective (docs/algorithms.md).
    """

    type: Literal["dao"] = "dao"
    """`dao`"""
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
    """`ppo`"""
    kl_coef: NotNegative = 0.05
    """Coefficient of the per-token KL to π₀ in the reward; 0 leaves the reference out."""


class DualPPOSpec(ActorCriticSpec):
    """PPO with both KL terms of DAR's objective: to π₀ in the reward, to π_t in the loss.

    The ablation DAR's paper names; the formula is derived (docs/algorithms.md).
    """

    type: Literal["dual_ppo"] = "dual_ppo"
    """`dual_ppo`"""
    alpha: Fraction = 0.1
    """Share of the regularisation that goes to π₀."""
    beta: Positive = 0.05
    """Total KL weight, reward units per nat."""


class RLOOSpec(AlgorithmSpec):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740); KL to π₀ in the reward."""

    needs_group: ClassVar[bool] = True

    type: Literal["rloo"] = "rloo"
    """`rloo`"""
    beta: NotNegative = 0.05
    """Coefficient of the KL to π₀, subtracted from the reward; 0 leaves the reference out."""
    clip_low: Fraction = 0.2
    """Lower clip of the sequence ratio (active from the second update of a batch on)."""
    clip_high: ClipHigh = 0.2
    """Upper clip of the sequence ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class ClippedGroupSpec(AlgorithmSpec):
    """What GRPO and its variants share."""

    needs_group: ClassVar[bool] = True

    clip_low: Fraction = 0.2
    """Lower clip of the token ratio."""
    clip_high: ClipHigh = 0.2
    """Upper clip of the token ratio; `.inf` = none."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class GRPOSpec(ClippedGroupSpec):
    """Group relative policy optimization as published (Shao et al. 2024, arXiv:2402.03300); KL to π₀ in the loss."""

    type: Literal["grpo"] = "grpo"
    """`grpo`"""
    beta: NotNegative = 0.04
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class BNPOSpec(ClippedGroupSpec):
    """GRPO averaged over all tokens of the batch instead of over completions, so that length carries no weight."""

    type: Literal["bnpo"] = "bnpo"
    """`bnpo`"""
    beta: NotNegative = 0.0
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class DAPOSpec(ClippedGroupSpec):
    """DAPO (Yu et al. 2025, arXiv:2503.14476): a higher upper clip, token mean, no KL, tied groups left out.

    Tied groups carry no weight and do not count in the mean; they are not sampled again.
    """

    type: Literal["dapo"] = "dapo"
    """`dapo`"""
    clip_high: ClipHigh = 0.28
    """Upper clip of the token ratio; `.inf` = none."""
    overlong_tokens: Count | None = None
    """Soft overlong penalty, falling from 0 to −1 over so many tokens before `sampling.max_completion_length`."""


class DrGRPOSpec(ClippedGroupSpec):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): no division by a group's deviation, nor by a row's own length."""

    type: Literal["dr_grpo"] = "dr_grpo"
    """`dr_grpo`"""
    beta: NotNegative = 0.0
    """Coefficient of the per-token k3 estimate of the KL to π₀; 0 leaves the reference out."""


class GSPOSpec(ClippedGroupSpec):
    """Group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071): one length-normalised ratio a row."""

    type: Literal["gspo"] = "gspo"
    """`gspo`"""
    clip_low: Fraction = 3e-4
    """Lower clip of the completion's mean ratio; with one update the ratio is 1 and no clip is active."""
    clip_high: ClipHigh = 4e-4
    """Upper clip of the completion's mean ratio; `.inf` = none."""


class BAPOSpec(AlgorithmSpec):
    """Balanced policy optimization with adaptive clipping (arXiv:2510.18927)."""

    needs_group: ClassVar[bool] = True

    type: Literal["bapo"] = "bapo"
    """`bapo`"""
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


class R2VPOSpec(AlgorithmSpec):
    """Ratio-variance regularized policy optimization (arXiv:2601.03320).

    Abstracts and one third-party implementation were read; dual step and defaults are derived (docs/algorithms.md).
    """

    needs_group: ClassVar[bool] = True

    type: Literal["r2vpo"] = "r2vpo"
    """`r2vpo`"""
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


class LCOSpec(AlgorithmSpec):
    """Logits convex optimization (arXiv:2603.00963), with the completion's advantage on the sampled token.

    One update per batch, as in the authors' code: the target is then known from the sampled token alone.
    """

    needs_group: ClassVar[bool] = True

    type: Literal["lco"] = "lco"
    """`lco`"""
    loss: Literal["kld", "mse", "logcosh"] = "kld"
    """KL to the target distribution, or squared or log-cosh distance of the sampled token's logit from its target."""
    beta: Positive = 2.0
    """Temperature of the target, π* ∝ π_t·exp(A/β)."""


class PairedSpec(AlgorithmSpec):
    """What methods that make pairs of their own samples share."""

    needs_group: ClassVar[bool] = True

    beta: Positive = 0.1
    """Scale of the log-ratio margin."""
    pairs: Literal["best_vs_worst", "first_two"] = "best_vs_worst"
    """Which two completions of a prompt are compared by reward. A tied pair is left out."""
    updates: Count = 1
    """Optimizer steps per batch of rollouts."""


class OnlineDPOSpec(PairedSpec):
    """Online DPO (Guo et al. 2024, arXiv:2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"
    """`online_dpo`"""


class OnlineIPOSpec(PairedSpec):
    """IPO's loss on pairs of own samples."""

    type: Literal["online_ipo"] = "online_ipo"
    """`online_ipo`"""


class OnlineSLiCSpec(PairedSpec):
    """SLiC's hinge loss on pairs of own samples."""

    type: Literal["online_slic"] = "online_slic"
    """`online_slic`"""


class SFTSpec(AlgorithmSpec):
    """Supervised fine-tuning on the completions of the data."""

    is_offline: ClassVar[bool] = True

    type: Literal["sft"] = "sft"
    """`sft`"""


class DPOSpec(AlgorithmSpec):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    is_offline: ClassVar[bool] = True

    type: Literal["dpo"] = "dpo"
    """`dpo`"""
    beta: Positive = 0.1
    """Scale of the log-ratio margin."""


class IPOSpec(AlgorithmSpec):
    """IPO (Azar et al. 2023, arXiv:2310.12036), on sums of log-probabilities."""

    is_offline: ClassVar[bool] = True

    type: Literal["ipo"] = "ipo"
    """`ipo`"""
    beta: Positive = 0.1
    """The margin is drawn to 1/(2β)."""


class SLiCSpec(AlgorithmSpec):
    """The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on the log-ratio margin."""

    is_offline: ClassVar[bool] = True

    type: Literal["slic"] = "slic"
    """`slic`"""
    beta: Positive = 0.1
    """Scale of the log-ratio margin."""


class ChiPOSpec(AlgorithmSpec):
    """χPO (Huang et al. 2024, arXiv:2407.13399): DPO with a link that also bounds the χ² divergence."""

    is_offline: ClassVar[bool] = True

    type: Literal["chi_po"] = "chi_po"
    """`chi_po`"""
    beta: Positive = 0.05
    """Scale of the margin."""
    max_reward: Annotated[float, Field(gt=0)] = math.inf
    """The margin is clipped to ±2 of these; `.inf` = not."""


class VARSpec(AlgorithmSpec):
    """Variational alignment with re-weighting (arXiv:2502.11026): reward-labelled completions, weighted."""

    is_offline: ClassVar[bool] = True

    type: Literal["var"] = "var"
    """`var`"""
    temperature: Positive = 1.0
    """λ of the weights K · softmax(r/λ), in standard deviations of the batch's rewards when normalised."""
    normalize: Literal["batch", "none"] = "batch"
    """Divide rewards by their standard deviation over the batch (and centre them), or leave them."""


AnyAlgorithm = Annotated[
    DARSpec
    | AWRSpec
    | BestOfNSpec
    | DAOSpec
    | PPOSpec
    | DualPPOSpec
    | RLOOSpec
    | GRPOSpec
    | BNPOSpec
    | DAPOSpec
    | DrGRPOSpec
    | GSPOSpec
    | BAPOSpec
    | R2VPOSpec
    | LCOSpec
    | OnlineDPOSpec
    | OnlineIPOSpec
    | OnlineSLiCSpec
    | SFTSpec
    | DPOSpec
    | IPOSpec
    | SLiCSpec
    | ChiPOSpec
    | VARSpec,
    Field(discriminator="type"),
]
ALGORITHM_SPECS: dict[str, type[AlgorithmSpec]] = {
    spec.model_fields["type"].default: spec for spec in get_args(get_args(AnyAlgorithm)[0])
}
