"""Weighted regression on a policy's own samples: DAR, AWR (DAR with α = 0), best-of-N and VAR.

A regression method turns rewards into one fixed weight per completion and then does weighted supervised fine-tuning.
Weights are computed in log space and fp32, carry no gradient, and are exponentiated only after clipping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dar.advantages import first_best
from dar.ops import masked_sum, require_positive, require_same_shape


@torch.no_grad()
def dar_log_weights(
    old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """Log of DAR's regression weight, one per completion.

        log w = α · Σ_t [log π₀(y_t) − log π_t(y_t)] + A / β

    α = 0 is AWR (on-policy, Monte-Carlo baseline): the reference then plays no part and is not read.

    Args:
        old_logprobs: [B, T] nats under π_t, the policy that sampled.
        ref_logprobs: [B, T] nats under π₀.
        advantages: [B] reward units (batch standard deviations after the default normalisation).
        mask: [B, T] bool, True on sampled tokens, EOS included.
        alpha: share of the regularisation that goes to π₀, in [0, 1].
        beta: total KL weight, reward units per nat, > 0.

    Returns:
        [B] fp32, unclipped, no gradient.

    Raises:
        ValueError: shapes differ, alpha outside [0, 1] or beta ≤ 0.

    He et al. 2026, arXiv:2602.11523, Thm 4.2. Kept in log space: exp(A/β) alone leaves fp32 at 4.44 standard
    deviations when β = 0.05, and w_reg · w_adv taken apart can be 0 · ∞.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share and must lie in [0, 1], got {alpha}")
    require_positive(beta=beta)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    log_w_adv = advantages.float() / beta
    if alpha == 0:
        return log_w_adv
    log_w_reg = alpha * (masked_sum(ref_logprobs.float(), mask) - masked_sum(old_logprobs.float(), mask))
    return log_w_reg + log_w_adv


@torch.no_grad()
def clip_log_weights(log_weights: Tensor, w_clip: float) -> Tensor:
    """w = exp(min(log w, log w_clip)): finite for any finite log w, at most w_clip.

    Args:
        log_weights: [B] unclipped.
        w_clip: upper bound, > 0; `math.inf` turns clipping off.

    Returns:
        [B] fp32 in [0, w_clip].

    Raises:
        ValueError: w_clip ≤ 0.

    He et al. 2026, arXiv:2602.11523 (w_clip = 20). To count clipped rows use `is_clipped`, not `w >= w_clip`.
    """
    require_positive(w_clip=w_clip)
    # exp(log w_clip) can be an ulp above w_clip; the bound is a promise.
    return log_weights.float().clamp(max=math.log(w_clip)).exp().clamp(max=w_clip)


def is_clipped(log_weights: Tensor, w_clip: float) -> Tensor:
    """[B] bool: the weight is bounded by w_clip.

    Decided on the logarithm, because exp(log 20) is 19.999999999999996 in float64 and `w >= w_clip` would report
    that nothing was ever clipped.
    """
    return log_weights >= math.log(w_clip)


@torch.no_grad()
def var_weights(rewards: Tensor, *, temperature: float) -> Tensor:
    """VAR's self-normalised weights: w_k = K · softmax_k(r / λ), mean 1 over each prompt.

    Equals DAR with α = 1, π_t = π₀, no clip, and weights divided by their group mean.

    Args:
        rewards: [P, K] reward units.
        temperature: λ, reward units, > 0. λ → ∞ is plain SFT (w = 1), λ → 0 puts all K on the best.

    Returns:
        [P, K] fp32.

    Raises:
        ValueError: temperature ≤ 0.

    arXiv:2502.11026 (case y ~ π₀; the per-prompt normaliser is derived, the paper's in-batch one was not seen).
    """
    require_positive(temperature=temperature)
    return rewards.shape[1] * torch.softmax(rewards.float() / temperature, dim=1)


@torch.no_grad()
def best_of_n_weights(rewards: Tensor) -> Tensor:
    """SFT on the best of N: weight 1 on the best completion of each prompt (the first of equals), 0 elsewhere.

    Args:
        rewards: [P, K] reward units; NaN where a completion has none.

    Returns:
        [P, K] fp32 of zeros and ones, one 1 per row that has a reward.
    """
    weights = torch.zeros_like(rewards, dtype=torch.float32)
    return weights.scatter_(1, first_best(rewards), 1.0).masked_fill(rewards.isnan(), 0.0)


def weighted_nll(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """−w · Σ_t log π_θ(y_t), one term per completion; the gradient flows through `logprobs` alone.

        L(θ) = −E_{y~π_t}[ sg(w) · log π_θ(y | x) ]

    A sum over tokens, not a mean: dividing each row by its own length moves the fixed point to ∝ π_t·w/|y|, a bias
    towards short completions. Dividing the whole batch by a constant is harmless, and is the caller's business.

    Args:
        logprobs: [B, T] nats under π_θ.
        weights: [B]; a negative one pushes the completion's probability down, without bound.
        mask: [B, T] bool, True on sampled tokens, EOS included.

    Returns:
        [B], unreduced.

    Raises:
        ValueError: shapes differ.

    He et al. 2026, arXiv:2602.11523, eq. for L(θ) after Thm 4.2; Peng et al. 2019, arXiv:1910.00177.
    """
    require_same_shape(weights=weights, rows=mask[:, 0])
    return -weights.detach() * masked_sum(logprobs, mask)


def group_cross_entropy(scores: Tensor, old_scores: Tensor, weights: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """−q_i · log p_i, one term per completion: the shares of a prompt's completions, fitted to weighted old ones.

        p = softmax(s),   q ∝ w · exp(s_old)   over the completions of one prompt        ∂ Σ_j L_j / ∂s_i = p_i − q_i

    A completion whose share is above its target's is pushed down, and where p = q nothing is moved.

    Args:
        scores, old_scores: [B] nats under π_θ and π_t, groups one behind the other, up to a constant of each group.
        weights: [B] ≥ 0, up to a factor of each group; a completion of weight 0 is as if it were not there.
        group_sizes: completions of each group; they sum to B.

    Returns:
        [B], unreduced; 0 for a completion that is alone.

    Kaddour 2026, arXiv:2604.06159, eqs. 1 to 3.
    """
    absent = weights == 0
    targets = (old_scores + weights.to(scores).log()).detach()
    # Not −∞, of which a group without any weight would make NaN.
    parts = (each.masked_fill(absent, -1e30).split(list(group_sizes)) for each in (scores, targets))
    losses = [-target.softmax(0) * score.log_softmax(0) for score, target in zip(*parts, strict=True)]
    return torch.cat(losses).masked_fill(absent, 0.0)
