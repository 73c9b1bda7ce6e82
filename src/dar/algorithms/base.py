"""The named bundles: which advantage, which weights, which objective, which denominator.

An algorithm turns a frozen experience of the **global** batch into fixed per-row quantities (`weigh`), and then only
says what the loss of some rows is (`terms`). The trainer calls these two and does not know which algorithm it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dar import advantages as adv
from dar.batch import Experience, Weighted
from dar.config import DARSpec, GRPOSpec, RLOOSpec
from dar.objectives.ratio import clipped_surrogate, clipped_tokens, sequence_clipped_surrogate
from dar.objectives.regression import clip_log_weights, dar_log_weights, is_clipped, weighted_nll
from dar.ops import Mean, effective_sample_size, kl_k1, kl_k3, masked_sum

Metrics = dict[str, float]


@dataclass(frozen=True)
class Terms:
    """The loss of some rows, unreduced, and what is worth logging about them.

    losses: [B] per row, to be summed and divided by the global denominator.
    means: parts of means over rows or tokens, added up over micro-batches and ranks.
    """

    losses: Tensor
    means: dict[str, Mean]


class Algorithm(Protocol):
    """What the trainer asks of a method."""

    @property
    def updates(self) -> int:
        """Optimizer steps per batch of rollouts."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under π₀ are read; False skips that pass."""
        ...

    def weigh(self, experience: Experience) -> tuple[Weighted, Metrics]:
        """Fixes advantages, weights and denominator from the global batch; no gradient."""
        ...

    def terms(self, logprobs: Tensor, batch: Weighted) -> Terms:
        """The loss of each row of a micro-batch, from [B, T] log-probabilities under π_θ."""
        ...


class DAR:
    """Dual-regularized Advantage Regression: weighted SFT on π_t's own samples.

        L(θ) = −(1/B) Σ_i sg(min(w_reg·w_adv, w_clip)) · log π_θ(y_i | x_i)

    He et al. 2026, arXiv:2602.11523; algorithm box of arXiv:2504.14177. α = 0 is AWR with a Monte-Carlo baseline.
    """

    def __init__(self, spec: DARSpec) -> None:
        self.spec = spec

    @property
    def updates(self) -> int:
        return self.spec.updates

    @property
    def needs_reference(self) -> bool:
        return self.spec.alpha > 0

    def weigh(self, experience: Experience) -> tuple[Weighted, Metrics]:
        spec = self.spec
        baseline = adv.group_mean if spec.baseline == "group_mean" else adv.leave_one_out
        advantages = baseline(experience.rewards)
        if spec.normalize == "batch":
            advantages = adv.batch_standardized(advantages)
        rows = advantages.reshape(-1)
        _require_reference(self, experience)
        # With α = 0 the reference plays no part: w_reg is 1 whatever stands here.
        ref = experience.old_logprobs if experience.ref_logprobs is None else experience.ref_logprobs
        log_weights = dar_log_weights(
            experience.old_logprobs, ref, rows, experience.mask, alpha=spec.alpha, beta=spec.beta
        )
        weights = clip_log_weights(log_weights, spec.w_clip)
        metrics = weight_metrics(weights, log_weights, w_clip=spec.w_clip)
        if spec.alpha > 0:
            log_w_reg = spec.alpha * masked_sum(ref - experience.old_logprobs, experience.mask)
            metrics["weights/log_w_reg_mean"] = float(log_w_reg.mean())
            # E[w_reg] over π_t is the normaliser C of Prop. 4.1, so this estimates −log C ≥ 0.
            metrics["weights/neg_log_mean_w_reg"] = math.log(len(rows)) - float(log_w_reg.logsumexp(0))
        match spec.weight_scale:
            case "none":
                scale = 1.0
            case "clip":
                scale = spec.w_clip
            case "mean":
                # An all-zero batch has nothing to normalise; every weight then stays 0.
                scale = float(weights.mean()) or 1.0
        return _weighted(experience, rows, weights / scale), metrics

    def terms(self, logprobs: Tensor, batch: Weighted) -> Terms:
        return Terms(weighted_nll(logprobs, batch.weights, batch.mask), {})


class RLOO:
    """REINFORCE leave-one-out: sequence-level ratio, KL to π₀ in the reward.

        R = r − β Σ_t (log π_t − log π₀),  A_i = R_i − mean_{j≠i} R_j,  L = −mean_i min(ρ_i A_i, clip(ρ_i) A_i)

    Ahmadian et al. 2024, arXiv:2402.14740.
    """

    def __init__(self, spec: RLOOSpec) -> None:
        self.spec = spec

    @property
    def updates(self) -> int:
        return self.spec.updates

    @property
    def needs_reference(self) -> bool:
        return self.spec.beta > 0

    def weigh(self, experience: Experience) -> tuple[Weighted, Metrics]:
        _require_reference(self, experience)
        rewards = experience.rewards
        if experience.ref_logprobs is not None:
            drift = masked_sum(kl_k1(experience.old_logprobs, experience.ref_logprobs), experience.mask)
            rewards = rewards - self.spec.beta * drift.reshape(rewards.shape)
        rows = adv.leave_one_out(rewards).reshape(-1)
        # A row without advantage has a loss that is 0 whatever the policy does.
        return _weighted(experience, rows, (rows != 0).float()), {}

    def terms(self, logprobs: Tensor, batch: Weighted) -> Terms:
        spec, mask = self.spec, batch.mask
        losses = batch.weights * sequence_clipped_surrogate(
            logprobs, batch.old_logprobs, batch.advantages, mask, clip_low=spec.clip_low, clip_high=spec.clip_high
        )
        log_ratio = masked_sum(logprobs.detach() - batch.old_logprobs, mask)
        clipped = clipped_tokens(log_ratio, batch.advantages, clip_low=spec.clip_low, clip_high=spec.clip_high)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(clipped)})


class GRPO:
    """Group relative policy optimization as published: token-level ratio, each completion's tokens averaged.

        A_i = (r_i − mean r) / (std r + ε),
        L = mean_i (1/|y_i|) Σ_t [ −min(ρ_t A_i, clip(ρ_t) A_i) + β k3(π_θ‖π₀)_t ]

    Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4. The sample standard deviation (ddof 1) and ε = 1e-4 are TRL's.
    """

    def __init__(self, spec: GRPOSpec) -> None:
        self.spec = spec

    @property
    def updates(self) -> int:
        return self.spec.updates

    @property
    def needs_reference(self) -> bool:
        return self.spec.beta > 0

    def weigh(self, experience: Experience) -> tuple[Weighted, Metrics]:
        _require_reference(self, experience)
        rows = adv.group_standardized(experience.rewards, ddof=1, eps=1e-4).reshape(-1)
        # The row's weight carries the 1/|y| of the objective; without a KL term a tied group's rows have none.
        weights = 1.0 / experience.groups.lengths().float()
        if not self.needs_reference:
            weights = weights * (rows != 0)
        return _weighted(experience, rows, weights), {}

    def terms(self, logprobs: Tensor, batch: Weighted) -> Terms:
        spec, mask = self.spec, batch.mask
        per_token = clipped_surrogate(
            logprobs, batch.old_logprobs, batch.advantages, mask, clip_low=spec.clip_low, clip_high=spec.clip_high
        )
        if batch.ref_logprobs is not None:
            # Padding is filled before the exponential: behind it, 0 · ∞ would make the gradient NaN.
            current, reference = (lp.masked_fill(~mask, 0.0) for lp in (logprobs, batch.ref_logprobs.detach()))
            per_token = per_token + spec.beta * kl_k3(current, reference)
        log_ratio = (logprobs.detach() - batch.old_logprobs)[mask]
        token_advantages = batch.advantages.unsqueeze(1).expand_as(mask)[mask]
        clipped = clipped_tokens(log_ratio, token_advantages, clip_low=spec.clip_low, clip_high=spec.clip_high)
        losses = batch.weights * masked_sum(per_token, mask)
        return Terms(losses, {"clip_ratio/region_mean": Mean.of(clipped)})


def _require_reference(algorithm: Algorithm, experience: Experience) -> None:
    """Raises ValueError where the method reads π₀ and the experience has none: its KL would silently be 0."""
    if algorithm.needs_reference and experience.ref_logprobs is None:
        raise ValueError(f"{type(algorithm).__name__} reads the reference, but the experience has no ref_logprobs")


def _weighted(experience: Experience, advantages: Tensor, weights: Tensor) -> Weighted:
    """Rows of an experience, to be averaged over the global batch."""
    return Weighted(
        groups=experience.groups,
        old_logprobs=experience.old_logprobs,
        ref_logprobs=experience.ref_logprobs,
        advantages=advantages,
        weights=weights,
        denominator=float(len(weights)),
    )


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


def kl_metrics(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, *, name: str) -> Metrics:
    """KL(p‖q) from samples of p: k1 and k3, per completion (summed over tokens) and per token.

    Args:
        logprobs, other_logprobs: [B, T] nats under p and q.
        mask: [B, T] bool.
        name: `ref` or `old`. TRL's `kl` is `kl/<name>_k3_per_token`.
    """
    estimators: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"": kl_k1, "_k3": kl_k3}
    metrics: Metrics = {}
    for suffix, estimator in estimators.items():
        per_row = masked_sum(estimator(logprobs.float(), other_logprobs.float()), mask)
        metrics[f"kl/{name}{suffix}"] = float(per_row.mean())
        metrics[f"kl/{name}{suffix}_per_token"] = float(per_row.sum() / mask.sum())
    return metrics
