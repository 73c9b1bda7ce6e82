"""Weighted regression: DAR, AWR, TPO and best-of-N on own samples, VAR and SFT on logged ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.regression import (
    AnyRegression,
    AWRSpec,
    BestOfNSpec,
    DARSpec,
    SFTSpec,
    TargetESSSpec,
    TargetKLSpec,
    TPOSpec,
    VARSpec,
)
from dar.objectives.adaptive import beta_for_ess, beta_for_kl
from dar.objectives.regression import (
    best_of_n_weights,
    clip_log_weights,
    dar_log_weights,
    group_cross_entropy,
    is_clipped,
    var_weights,
    weighted_nll,
)
from dar.ops import effective_sample_size, masked_sum


class _Regression(Algorithm):
    """Σ over completions of weight · −log π_θ(y); a subclass says which weights."""

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        return Terms(weighted_nll(outputs.logprobs, batch.weights, batch.mask), {})


class DAR(_Regression):
    """Dual-regularized Advantage Regression: weighted SFT on π_t's own samples.

        L(θ) = −(1/B) Σ_i sg(min(w_reg·w_adv, w_clip)) · log π_θ(y_i | x_i)

    With `normalize_weights: group` it is −mean_x Σ_i sg(w_i / Σ_j w_j) · log(ρ_i / Σ_j ρ_j), ρ = π_θ/π_t (derived).

    He et al. 2026, arXiv:2602.11523; algorithm box of arXiv:2504.14177. α = 0 is AWR with a Monte-Carlo baseline.
    """

    def __init__(self, spec: DARSpec) -> None:
        self.spec = spec
        self.updates = spec.updates
        self.needs_reference = spec.alpha > 0
        self.reads_rows_together = spec.normalize_weights == "group"

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        spec = self.spec
        baseline = adv.group_mean if spec.baseline == "group_mean" else adv.leave_one_out
        advantages = baseline(batch.rewards)
        if spec.normalize == "batch":
            advantages = adv.batch_standardized(advantages)
        rows = batch.to_rows(advantages)
        require_reference(self, batch)
        # With α = 0 the reference plays no part: w_reg is 1 whatever stands here.
        ref = batch.old_logprobs if batch.ref_logprobs is None else batch.ref_logprobs
        log_w_reg = spec.alpha * masked_sum(ref - batch.old_logprobs, batch.mask)
        beta, metrics = _beta(spec.beta, rows, log_w_reg)
        log_weights = dar_log_weights(batch.old_logprobs, ref, rows, batch.mask, alpha=spec.alpha, beta=beta)
        weights = clip_log_weights(log_weights, spec.w_clip)
        metrics |= weight_metrics(weights, log_weights, w_clip=spec.w_clip)
        if spec.alpha > 0:
            metrics["weights/log_w_reg_mean"] = float(log_w_reg.mean())
            # E[w_reg] over π_t is the normaliser C of Prop. 4.1, so this estimates −log C ≥ 0.
            metrics["weights/neg_log_mean_w_reg"] = math.log(len(rows)) - float(log_w_reg.logsumexp(0))
        if spec.normalize_weights == "group":
            return _in_groups(batch, rows, log_weights.clamp(max=math.log(spec.w_clip)), updates=self.updates), metrics
        # An all-zero batch has nothing to normalise; every weight then stays 0.
        scales = {"none": 1.0, "clip": spec.w_clip, "mean": float(weights.mean()) or 1.0}
        weights = weights / scales[spec.weight_scale]
        if spec.center_weights:
            # In float64 equal weights are exactly their mean, and leave nothing.
            weights = (weights - weights.double().mean()).float()
        return batch.weighted(rows, weights), metrics

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        if not self.reads_rows_together:
            return super().terms(outputs, batch)
        ratios = masked_sum(outputs.logprobs - batch.old_logprobs.detach(), batch.mask)
        old = torch.zeros_like(ratios)
        return Terms(group_cross_entropy(ratios, old, batch.weights, batch.groups.group_sizes), {})


def awr(spec: AWRSpec) -> DAR:
    """Advantage-weighted regression, which is DAR with α = 0.

        L(θ) = −(1/B) Σ_i sg(min(exp(A_i/β), w_clip)) · log π_θ(y_i | x_i)

    Peng et al. 2019, arXiv:1910.00177, on-policy, with a Monte-Carlo baseline instead of a critic.
    """
    return DAR(DARSpec(alpha=0.0, beta=spec.beta, w_clip=spec.w_clip, normalize=spec.normalize, updates=spec.updates))


class BestOfN(_Regression):
    """SFT on the best of each prompt's completions: L = −mean_p log π_θ(y_best | x_p).

    The baseline SFT + Best-of-N of arXiv:2504.14177. For a continuous reward the target's density is
    K·F(r)^(K−1)·π_t, at log K − (K−1)/K nats from π_t.
    """

    def __init__(self, spec: BestOfNSpec) -> None:
        self.updates = spec.updates

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        weights = best_of_n_weights(batch.rewards)
        rows = adv.group_mean(batch.rewards)
        # One 1 for each prompt.
        denominator = float(weights.sum())
        return batch.weighted(batch.to_rows(rows), batch.to_rows(weights), denominator=denominator), {}


class TPO(Algorithm):
    """Target Policy Optimization: the policy's shares of a prompt's completions, fitted to a tilt of what they were.

        L(θ) = −mean_x Σ_i sg(q_i) · log p_i,   p = softmax_i(ℓ_i),   q ∝ p_old · exp(u/η)

    ℓ is log π_θ(y), or its mean over the tokens. Kaddour 2026, arXiv:2604.06159.
    """

    reads_rows_together = True

    def __init__(self, spec: TPOSpec) -> None:
        self.spec = spec
        self.updates = spec.updates

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rows = batch.to_rows(adv.group_standardized(batch.rewards, ddof=0, eps=0.0))
        old = self._scores(batch.old_logprobs, batch).split(list(batch.groups.group_sizes))
        metrics = {"group/max_share": sum(float(group.softmax(0).max()) for group in old) / len(old)}
        return _in_groups(batch, rows, rows / self.spec.temperature, updates=self.updates), metrics

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        scores, old = (self._scores(logprobs, batch) for logprobs in (outputs.logprobs, batch.old_logprobs))
        return Terms(group_cross_entropy(scores, old, batch.weights, batch.groups.group_sizes), {})

    def _scores(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return masked_sum(logprobs, batch.mask) / (batch.mask.sum(1) if self.spec.score == "mean" else 1)


def _in_groups(batch: Batch, advantages: Tensor, log_weights: Tensor, *, updates: int) -> Weighted:
    """Weights with a mean of 1 over each prompt's completions, and a loss that is averaged over prompts.

    They are 0 where all of a prompt's are alike, which moves nothing while π_θ is π_t, and nowhere else: a completion
    whose target is next to nothing has its share of the group to lose.
    """
    sizes = list(batch.groups.group_sizes)
    weights = torch.cat([len(group) * group.softmax(0) for group in log_weights.float().split(sizes)])
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)
    if updates == 1:
        table = batch.to_table(log_weights)
        weights = weights.masked_fill(batch.to_rows(adv.is_tied(table).expand_as(table)), 0.0)
    return batch.weighted(advantages, weights, denominator=float(len(sizes)))


class VAR(_Regression):
    """Reward-labelled completions, weighted by K · softmax(r/λ) within each prompt.

    arXiv:2502.11026, case y ~ π₀ (the per-prompt normaliser is derived; the paper's was not seen).
    """

    def __init__(self, spec: VARSpec) -> None:
        self.spec = spec

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        rewards = batch.rewards
        if self.spec.normalize == "batch":
            rewards = adv.batch_standardized(rewards)
        weights = batch.to_rows(var_weights(rewards, temperature=self.spec.temperature))
        rows = batch.to_rows(adv.group_mean(batch.rewards))
        return batch.weighted(rows, weights), {
            "weights/ess_fraction": float(effective_sample_size(weights)) / len(weights)
        }


class SFT(_Regression):
    """Supervised fine-tuning: the mean of −log π_θ(y_t) over all tokens of the batch."""

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        ones = batch.rewards.new_ones(batch.groups.num_rows)
        return batch.weighted(ones, ones, denominator=float(batch.mask.sum())), {}


def _beta(spec: float | TargetKLSpec | TargetESSSpec, advantages: Tensor, log_w_reg: Tensor) -> tuple[float, Metrics]:
    """β of this batch, and what is worth logging where it was chosen."""
    match spec:
        case TargetKLSpec():
            found = beta_for_kl(advantages, log_w_reg, target_kl=spec.target_kl)
        case TargetESSSpec():
            found = beta_for_ess(advantages, log_w_reg, target_ess=spec.target_ess)
        case _:
            return spec, {}
    return found.beta, {"weights/beta": found.beta, "weights/target_reached": float(found.is_reached)}


def weight_metrics(weights: Tensor, log_weights: Tensor, *, w_clip: float) -> Metrics:
    """How regression weights are spread over the batch.

    Args:
        weights: [B] clipped, before any rescaling.
        log_weights: [B] unclipped.
        w_clip: the bound; clipping is decided on the logarithm.
    """
    return {
        "weights/mean": float(weights.mean()),
        "weights/clip_fraction": float(is_clipped(log_weights, w_clip).float().mean()),
        "weights/zero_fraction": float((weights < 0.01).float().mean()),
        "weights/ess_fraction": float(effective_sample_size(weights)) / len(weights),
    }


def build(spec: AnyRegression) -> Algorithm:
    """The method a spec stands for."""
    match spec:
        case DARSpec():
            return DAR(spec)
        case AWRSpec():
            return awr(spec)
        case BestOfNSpec():
            return BestOfN(spec)
        case TPOSpec():
            return TPO(spec)
        case SFTSpec():
            return SFT()
        case VARSpec():
            return VAR(spec)
