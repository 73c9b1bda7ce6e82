"""Objectives on the probability ratio ρ = π_θ / π_t: the clipped surrogate at token and at sequence level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar.ops import masked_sum, require_same_shape


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped surrogate, per token: −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A).

    Args:
        logprobs: [B, T] nats under π_θ; the gradient flows here.
        old_logprobs: [B, T] nats under π_t.
        advantages: [B, T], or [B] for an advantage shared by all tokens of a completion (GRPO).
        mask: [B, T] bool, True on sampled tokens.
        clip_low: ε_low in [0, 1].
        clip_high: ε_high ≥ 0; `math.inf` turns the upper bound off.

    Returns:
        [B, T] unreduced, 0 where the mask is False.

    Raises:
        ValueError: shapes differ or a bound is out of range.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; asymmetric bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    if advantages.ndim == 1:
        require_same_shape(advantages=advantages, rows=mask[:, 0])
        advantages = advantages.unsqueeze(1).expand_as(mask)
    require_same_shape(advantages=advantages, mask=mask)
    # Padding may hold anything; filling before the exponential keeps NaN out of the backward pass too.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    return _surrogate(log_ratio, advantages.detach(), clip_low, clip_high).masked_fill(~mask, 0.0)


def sequence_clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped surrogate with one ratio per completion: ρ = exp(Σ_t log π_θ − Σ_t log π_t).

    Args:
        logprobs, old_logprobs, mask: as for `clipped_surrogate`.
        advantages: [B].
        clip_low, clip_high: as for `clipped_surrogate`.

    Returns:
        [B] unreduced.

    Raises:
        ValueError: shapes differ or a bound is out of range.

    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, with PPO's clipping as TRL's RLOO trainer applies it. With one
    update per batch ρ = 1 and the gradient is −A · ∇ log π_θ(y).
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    log_ratio = masked_sum(logprobs - old_logprobs.detach(), mask)
    return _surrogate(log_ratio, advantages.detach(), clip_low, clip_high)


def _surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be ≥ 0, got {clip_low} and {clip_high}")
    # min(ρA, clip(ρ)A) bounds ρ from above where A ≥ 0 and from below where A < 0. Taking the bound on the logarithm
    # keeps a clipped ratio from overflowing first, which would make its gradient 0 · ∞.
    upper = math.log1p(clip_high)
    lower = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    return -advantages * bounded.exp()


def clipped_tokens(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Bool, same shape: the bound is active and the gradient is therefore 0 (ρ > 1+ε_high with A > 0, or ρ < 1−ε_low
    with A < 0)."""
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
