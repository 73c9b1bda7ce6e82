"""Critic-free policy gradients on the probability ratio: RLOO, GRPO and its variants, DAO, BAPO, R²VPO, CISPO, DPPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms, UpdateTokens, require_reference
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.policy_gradient import (
    AnyPolicyGradient,
    BAPOSpec,
    BNPOSpec,
    CISPOSpec,
    ClippedGroupSpec,
    DAOSpec,
    DAPOSpec,
    DistillSpec,
    DPPOSpec,
    DrGRPOSpec,
    GRPOSpec,
    GSPOSpec,
    MaxRLSpec,
    R2VPOSpec,
    RLOOSpec,
)
from dar.objectives import policy_gradient as pg
from dar.objectives.bapo import bapo_bounds
from dar.ops import Mean, kl_k1, kl_k3, masked_sum


class RLOO(Algorithm):
    """REINFORCE leave-one-out: sequence-level ratio, KL to π₀ in the reward.

        R = r − β Σ_t (log π_t − log π₀),  A_i = R_i − mean_{j≠i} R_j,  L = −mean_i min(ρ_i A_i, clip(ρ_i) A_i)

    Ahmadian et al. 2024, arXiv:2402.14740.
    """

    def __init__(self, spec: RLOOSpec) -> None:
        self.spec = spec
        self.updates = spec.updates
        self.needs_reference = spec.beta > 0

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        rewards = batch.rewards
        if batch.ref_logprobs is not None:
            drift = masked_sum(kl_k1(batch.old_logprobs, batch.ref_logprobs), batch.mask)
            rewards = rewards - self.spec.beta * batch.to_table(drift)
        rows = batch.to_rows(adv.leave_one_out(rewards))
        # A row without advantage has a loss that is 0 whatever the policy does.
        return batch.weighted(rows, (rows != 0).float()), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        spec, mask, logprobs = self.spec, batch.mask, outputs.logprobs
        losses = batch.weights * pg.sequence_clipped_surrogate(
            logprobs, batch.old_logprobs, batch.advantages, mask, clip_low=spec.clip_low, clip_high=spec.clip_high
        )
        log_ratio = masked_sum(logprobs.detach() - batch.old_logprobs, mask)
        clipped = pg.clipped_tokens(log_ratio, batch.advantages, clip_low=spec.clip_low, clip_high=spec.clip_high)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(clipped)})


class DAO(Algorithm):
    """DAR's dual-KL objective by policy gradient: L = −ρA + αβ ρ log(π_θ/π₀) + (1−α)β ρ log ρ, derived.

    Named in He et al. 2026, arXiv:2602.11523, as the variant without regression; its formula was not found.
    """

    def __init__(self, spec: DAOSpec) -> None:
        self.spec = spec
        self.updates = spec.updates
        self.needs_reference = spec.alpha > 0

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        advantages = adv.group_mean(batch.rewards)
        if self.spec.normalize == "batch":
            advantages = adv.batch_standardized(advantages)
        rows = batch.to_rows(advantages)
        return batch.weighted(rows, torch.ones_like(rows)), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        spec = self.spec
        tensors = (outputs.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.mask)
        if spec.ratio_level == "sequence":
            return Terms(batch.weights * pg.dao(*tensors, alpha=spec.alpha, beta=spec.beta), {})
        per_token = pg.dao_tokens(*tensors, alpha=spec.alpha, beta=spec.beta)
        return Terms(batch.weights * masked_sum(per_token, batch.mask), {})


class _GroupRelative(Algorithm):
    """A group-standardised advantage shared by a completion's tokens, and the clipped surrogate on the token ratio.

    The mean is over all tokens of the batch, unless a subclass says otherwise.
    """

    beta: float = 0.0

    def __init__(self, spec: ClippedGroupSpec) -> None:
        self.clip_low, self.clip_high, self.updates = spec.clip_low, spec.clip_high, spec.updates
        if isinstance(spec, GRPOSpec | BNPOSpec | DrGRPOSpec):
            self.beta = spec.beta
        self.needs_reference = self.beta > 0

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = self._advantages(batch)
        return batch.weighted(rows, self._carrying(rows), denominator=float(batch.mask.sum())), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        logprobs, mask = outputs.logprobs, batch.mask
        per_token = pg.clipped_surrogate(
            logprobs, batch.old_logprobs, batch.advantages, mask, clip_low=self.clip_low, clip_high=self.clip_high
        )
        if batch.ref_logprobs is not None and self.beta > 0:
            # Padding is filled before the exponential: behind it, 0 · ∞ would make the gradient NaN.
            current, reference = (lp.masked_fill(~mask, 0.0) for lp in (logprobs, batch.ref_logprobs.detach()))
            per_token = per_token + self.beta * kl_k3(current, reference)
        log_ratio = (logprobs.detach() - batch.old_logprobs)[mask]
        token_advantages = batch.advantages.unsqueeze(1).expand_as(mask)[mask]
        clipped = pg.clipped_tokens(log_ratio, token_advantages, clip_low=self.clip_low, clip_high=self.clip_high)
        losses = batch.weights * masked_sum(per_token, mask)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(clipped)})

    def _advantages(self, batch: Batch) -> Tensor:
        """[B]; the sample standard deviation (ddof 1) and ε = 1e-4 are TRL's."""
        require_reference(self, batch)
        return batch.to_rows(adv.group_standardized(batch.rewards, ddof=1, eps=1e-4))

    def _carrying(self, advantages: Tensor) -> Tensor:
        """[B] 1.0 where a row has a loss: without a KL term the rows of a tied group have none."""
        return torch.ones_like(advantages) if self.needs_reference else (advantages != 0).float()


class GRPO(_GroupRelative):
    """Group relative policy optimization as published: token-level ratio, each completion's tokens averaged.

        A_i = (r_i − mean r) / (std r + ε),
        L = mean_i (1/|y_i|) Σ_t [ −min(ρ_t A_i, clip(ρ_t) A_i) + β k3(π_θ‖π₀)_t ]

    Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4. The sample standard deviation (ddof 1) and ε = 1e-4 are TRL's.
    """

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = self._advantages(batch)
        # The row's weight carries the 1/|y| of the objective.
        return batch.weighted(rows, self._carrying(rows) / batch.mask.sum(1).float()), {}


class BNPO(_GroupRelative):
    """GRPO with one mean over all tokens of the batch: L = Σ_{i,t} ℓ_{i,t} / Σ_i |y_i|.

    TRL's loss_type "bnpo" takes this mean over a micro-batch; here it is the whole batch, whatever its parts.
    """


class DAPO(_GroupRelative):
    """DAPO: clip-higher, token mean over groups that are not tied, soft overlong penalty, no KL.

        r ← r + min(0, (L_max − L_cache − |y|)/L_cache),
        L = Σ_{i,t} −min(ρ_t A_i, clip(ρ_t, 1−ε_low, 1+ε_high) A_i) / Σ|y|

    Yu et al. 2025, arXiv:2503.14476. Its dynamic sampling is `sampling.resample_tied`.
    """

    def __init__(self, spec: DAPOSpec, *, max_completion_length: int) -> None:
        super().__init__(spec)
        self.overlong_tokens = spec.overlong_tokens
        self.max_completion_length = max_completion_length

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rewards, metrics = batch.rewards, Metrics()
        if self.overlong_tokens is not None:
            room = self.max_completion_length - self.overlong_tokens - batch.mask.sum(1)
            penalty = (room / self.overlong_tokens).clamp(min=-1.0, max=0.0)
            rewards = rewards + batch.to_table(penalty).to(rewards)
            metrics["rewards/overlong_penalty"] = float(penalty.mean())
        rows = batch.to_rows(adv.group_standardized(rewards, ddof=1, eps=1e-4))
        tied = batch.to_rows(adv.tied_groups(rewards).unsqueeze(1).expand_as(rewards))
        counted = float(batch.mask[~tied].sum())
        # A batch of nothing but ties has no token to average over, and no loss either.
        return batch.weighted(rows, self._carrying(rows), denominator=counted or 1.0), metrics


class DrGRPO(_GroupRelative):
    """Dr. GRPO: A_i = r_i − mean r, and L = Σ_{i,t} ℓ_{i,t} / (B · L_max).

    Liu et al. 2025, arXiv:2503.20783: neither a group's deviation nor a completion's own length scales its gradient.
    """

    def __init__(self, spec: DrGRPOSpec, *, max_completion_length: int) -> None:
        super().__init__(spec)
        self.max_completion_length = max_completion_length

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        rows = batch.to_rows(adv.group_mean(batch.rewards))
        tokens = float(len(rows) * self.max_completion_length)
        return batch.weighted(rows, self._carrying(rows), denominator=tokens), {}


class GSPO(_GroupRelative):
    """Group sequence policy optimization: one ratio a completion, s = exp(mean_t (log π_θ − log π_t)), clipped.

    Zheng et al. 2025, arXiv:2507.18071.
    """

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = self._advantages(batch)
        return batch.weighted(rows, self._carrying(rows)), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        losses = batch.weights * pg.gspo(outputs.logprobs, batch.old_logprobs, batch.advantages, batch.mask, **bounds)
        mean_ratio = masked_sum(outputs.logprobs.detach() - batch.old_logprobs, batch.mask) / batch.mask.sum(1)
        clipped = pg.clipped_tokens(mean_ratio, batch.advantages, **bounds)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(clipped)})


class CISPO(_GroupRelative):
    """The ratio as a clipped, constant weight: L = mean_t −sg(clip(ρ_t)) A log π_θ. MiniMax-M1, arXiv:2506.13585."""

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        logprobs, old, mask = outputs.logprobs, batch.old_logprobs, batch.mask
        per_token = pg.cispo(logprobs, old, batch.advantages, mask, clip_low=self.clip_low, clip_high=self.clip_high)
        ratio = (logprobs.detach() - old)[mask].exp()
        is_clipped = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        return Terms(batch.weights * masked_sum(per_token, mask), {"cispo/clipped": Mean.of(is_clipped)})


class DPPO(_GroupRelative):
    """No gradient where an advantage has moved a token's probability further than δ. Qi et al., arXiv:2602.04879."""

    needs_probabilities = True

    def __init__(self, spec: DPPOSpec) -> None:
        self.spec, self.updates = spec, spec.updates

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        tensors, mask, max_shift = (outputs.logprobs, batch.old_logprobs), batch.mask, self.spec.max_shift
        per_token = pg.dppo(*tensors, batch.advantages, mask, max_shift=max_shift, max_ratio=self.spec.max_ratio)
        is_out = pg.out_of_region(*tensors, batch.advantages.unsqueeze(1), max_shift=max_shift)
        losses = batch.weights * masked_sum(per_token, mask)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(is_out, mask)})


class MaxRL(_GroupRelative):
    """A_i = (r_i − mean r) / mean r, which ascends the log of the success rate. Tajwar et al., arXiv:2602.02710."""

    def _advantages(self, batch: Batch) -> Tensor:
        return batch.to_rows(adv.over_mean(batch.rewards))


class BAPO(_GroupRelative):
    """GRPO's advantages under bounds that are searched anew before each update, so that positive tokens count enough.

    arXiv:2510.18927 and the authors' code; what differs between the two is an option (`dar.objectives.bapo`).
    """

    needs_ratios = True

    def __init__(self, spec: BAPOSpec) -> None:
        self.spec, self.updates = spec, spec.updates
        self.clip_low, self.clip_high = 1 - spec.low_start, spec.high_start - 1
        self.needs_probabilities = spec.criterion == "share"

    def begin_update(self, tokens: UpdateTokens) -> Metrics:
        spec = self.spec
        bounds = bapo_bounds(
            tokens.log_ratios.clamp(-20, 20).exp(),
            tokens.advantages,
            tokens.old_logprobs.exp() if spec.criterion == "share" else None,
            target=spec.target,
            low_range=(spec.low_start, spec.low_end),
            high_range=(spec.high_start, spec.high_end),
            low_step=spec.low_step,
            high_step=spec.high_step,
            contribution=spec.contribution,
            order=spec.order,
            criterion=spec.criterion,
        )
        self.clip_low, self.clip_high = 1 - bounds.low, bounds.high - 1
        return {"bapo/low": bounds.low, "bapo/high": bounds.high, "bapo/target_met": float(bounds.is_met)}


class R2VPO(Algorithm):
    """The ratio's variance as the trust region: L = mean_t [ −ρ_t A + λ (ρ_t − 1)² ], λ by dual ascent.

        λ ← max(0, λ + η (mean_t (ρ_t − 1)² − δ))

    arXiv:2601.03320; the dual step is derived.
    """

    def __init__(self, spec: R2VPOSpec) -> None:
        self.spec = spec
        self.updates = spec.updates
        self.replay = spec.replay
        self.penalty = spec.penalty

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = batch.to_rows(adv.group_standardized(batch.rewards, ddof=1, eps=1e-4))
        ones = torch.ones_like(rows)
        return batch.weighted(rows, ones, denominator=float(batch.mask.sum())), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        tensors = (outputs.logprobs, batch.old_logprobs)
        per_token = pg.r2vpo(*tensors, batch.advantages, batch.mask, penalty=self.penalty)
        variance = pg.ratio_variance(*tensors, batch.mask)
        losses = batch.weights * masked_sum(per_token, batch.mask)
        return Terms(losses, {"r2vpo/variance": Mean.of(variance, batch.mask)})

    def finish_update(self, means: Metrics) -> Metrics:
        # A batch that trains nothing has no variance.
        if "r2vpo/variance" in means:
            self.penalty = pg.dual_step(
                self.penalty, means["r2vpo/variance"], target=self.spec.max_variance, rate=self.spec.penalty_rate
            )
        return {"r2vpo/penalty": self.penalty}

    def state(self) -> dict[str, float]:
        return {"penalty": self.penalty}

    def restore(self, state: Mapping[str, float]) -> None:
        self.penalty = state["penalty"]


class Distill(Algorithm):
    """On-policy distillation: L = Σ_{i,t} `reverse_kl` / Σ_i |y_i|, the teacher being where π₀ is in other methods."""

    needs_reference = True

    def __init__(self, spec: DistillSpec) -> None:
        self.updates = spec.updates

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        assert batch.ref_logprobs is not None
        advantages = -kl_k1(batch.old_logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0)
        return batch.weighted(advantages, torch.ones(len(advantages)), denominator=float(batch.mask.sum())), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        assert batch.ref_logprobs is not None
        # Not of `advantages`, which are the sampler's: a student that is the teacher has no gradient at all.
        per_token = pg.reverse_kl(outputs.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.mask)
        return Terms(batch.weights * masked_sum(per_token, batch.mask), {})


def build(spec: AnyPolicyGradient, *, max_completion_length: int) -> Algorithm:
    """The method a spec stands for; some count in the most tokens a completion may have."""
    match spec:
        case DAOSpec():
            return DAO(spec)
        case RLOOSpec():
            return RLOO(spec)
        case GRPOSpec():
            return GRPO(spec)
        case BNPOSpec():
            return BNPO(spec)
        case DAPOSpec():
            return DAPO(spec, max_completion_length=max_completion_length)
        case DrGRPOSpec():
            return DrGRPO(spec, max_completion_length=max_completion_length)
        case GSPOSpec():
            return GSPO(spec)
        case CISPOSpec():
            return CISPO(spec)
        case DPPOSpec():
            return DPPO(spec)
        case MaxRLSpec():
            return MaxRL(spec)
        case BAPOSpec():
            return BAPO(spec)
        case R2VPOSpec():
            return R2VPO(spec)
        case DistillSpec():
            return Distill(spec)
