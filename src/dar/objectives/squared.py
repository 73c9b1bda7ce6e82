"""Squared regression of a completion's log-ratio on its reward: PMD-mean, A*-PO and QRPO.

The policy π* ∝ π_a exp(r/β) is the one with β log(π*/π_a)(y) = r(y) − V for all y, V = β log E_{y~π_a}[exp(r/β)]. What
is missing of that is squared. The methods differ in the anchor π_a and in what stands for V.
"""

from __future__ import annotations

import math

from torch import Tensor

from dar.ops import masked_sum, require_positive, require_same_shape


def squared_error(logprobs: Tensor, anchor: Tensor, advantages: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """L = (A − β Σ_t [log π_θ(y_t) − log π_a(y_t)])² / (2β), per completion.

    The gradient is −(A − β log(π_θ/π_a)) · ∇ log π_θ(y): at π_θ = π_a the policy gradient of A, whatever β is.

    Args:
        logprobs, anchor: [B, T] nats under π_θ, where the gradient flows, and under π_a.
        advantages: [B] A = r − V, reward units.
        mask: [B, T] bool, True on sampled tokens, EOS included.
        beta: reward units per nat, > 0.

    Returns:
        [B] unreduced.

    Raises:
        ValueError: shapes differ, or beta ≤ 0.

    arXiv:2501.12599 (π_a = π_t), arXiv:2505.20686 and arXiv:2507.08068 (π_a = π₀), but for the factor 1/(2β).
    """
    require_same_shape(logprobs=logprobs, anchor=anchor, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    require_positive(beta=beta)
    log_ratio = masked_sum(logprobs - anchor.detach(), mask)
    return (advantages.detach() - beta * log_ratio).square() / (2 * beta)


def optimal_value(ref_rewards: Tensor, *, beta: float) -> Tensor:
    """V* = β log mean_n exp(r_n/β) [...] of rewards [..., N] of samples of π₀: the most that E[r] − β KL[π‖π₀] can be.

    Raises ValueError where beta ≤ 0. arXiv:2505.20686. Too low on average for few samples (Jensen).
    """
    require_positive(beta=beta)
    return beta * ((ref_rewards / beta).logsumexp(-1) - math.log(ref_rewards.shape[-1]))


def uniform_optimal_value(beta: float) -> float:
    """V* = β log(β (e^(1/β) − 1)) of a reward that is uniform on [0, 1] under π₀, as its quantile is.

    Raises ValueError where beta ≤ 0. arXiv:2507.08068, whose code leaves the − 1 away (4.5e-6 more at β = 0.1).
    """
    require_positive(beta=beta)
    return 1 + beta * math.log(-beta * math.expm1(-1 / beta))
