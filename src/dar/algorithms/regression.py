"""Weighted regression: DAR, AWR and best-of-N on own samples, VAR and SFT on logged ones."""

from __future__ import annotations

import math

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
    VARSpec,
)
from dar.objectives.adaptive import beta_for_ess, beta_for_kl
from dar.objectives.regression import (
    best_of_n_weights,
    clip_log_weights,
    dar_log_weights,
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

    He et al. 2026, arXiv:2602.11523; algorithm box of arXiv:2504.14177. α = 0 is AWR with a Monte-Carlo baseline.
    """

    def __init__(self, spec: DARSpec) -> None:
        self.spec = spec
        self.updates = spec.updates
        self.needs_reference = spec.alpha > 0

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
        # An all-zero batch has nothing to normalise; every weight then stays 0.
        scales = {"none": 1.0, "clip": spec.w_clip, "mean": float(weights.mean()) or 1.0}
        return batch.weighted(rows, weights / scales[spec.weight_scale]), metrics


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
        case SFTSpec():
            return SFT()
        case VARSpec():
            return VAR(spec)
