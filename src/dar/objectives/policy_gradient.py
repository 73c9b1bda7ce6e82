"""Objectives on the probability ratio ρ = π_θ / π_t.

The clipped surrogate at token and at sequence level (PPO, GRPO, RLOO, GSPO), the surrogate with two KL penalties (DAO),
the one with a penalty on the ratio's variance (R2VPO), the log-likelihood with the ratio as a constant weight (CISPO,
DPPO), and the KL to the behaviour policy that dual PPO adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar.ops import masked_sum, require_not_negative, require_same_shape

MAX_LOG_RATIO = 20.0
"""DAO exponentiates a log-ratio no further than this from 0: e^20 = 4.85e8 is finite in every float type but fp16."""


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
    log_ratio = _token_log_ratio(logprobs, old_logprobs, mask)
    return _surrogate(log_ratio, _token_advantages(advantages, mask), clip_low, clip_high).masked_fill(~mask, 0.0)


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


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped surrogate with one length-normalised ratio per completion.

        L = −min(s A, clip(s, 1 − ε_low, 1 + ε_high) A),   s = exp( (1/|y|) Σ_t [log π_θ(y_t) − log π_t(y_t)] )

    s is the geometric mean of the token ratios, so one pair of bounds fits short and long completions. Inside the
    bounds every token of a completion has the gradient −s A / |y|.

    Args:
        logprobs, old_logprobs, mask: as for `clipped_surrogate`.
        advantages: [B].
        clip_low, clip_high: as for `clipped_surrogate`.

    Returns:
        [B] unreduced; a row without a sampled token has s = 1.

    Raises:
        ValueError: shapes differ or a bound is out of range.

    Zheng et al. 2025, arXiv:2507.18071.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    log_ratio = masked_sum(logprobs - old_logprobs.detach(), mask) / mask.sum(1).clamp(min=1)
    return _surrogate(log_ratio, advantages.detach(), clip_low, clip_high)


def _surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    lower, upper = _log_bounds(clip_low, clip_high)
    # min(ρA, clip(ρ)A) bounds ρ from above where A ≥ 0 and from below where A < 0. Taking the bound on the logarithm
    # keeps a clipped ratio from overflowing first, which would make its gradient 0 · ∞.
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    return -advantages * bounded.exp()


def _log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be ≥ 0, got {clip_low} and {clip_high}")
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def clipped_tokens(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Bool, same shape: the bound is active and the gradient is therefore 0 (ρ > 1+ε_high with A > 0, or ρ < 1−ε_low
    with A < 0)."""
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def dao(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float,
    beta: float,
) -> Tensor:
    """DAR's objective as a policy-gradient surrogate, one term per completion and without regression.

        L = −ρA + αβ ρ log(π_θ/π₀) + (1−α)β ρ log ρ,   ρ = exp(Σ_t [log π_θ(y_t) − log π_t(y_t)])

    E_{y~π_t}[L] = −E_{π_θ}[A] + β (α KL[π_θ‖π₀] + (1−α) KL[π_θ‖π_t]) exactly, so the optimum is DAR's π*. The gradient
    flows through ρ and the logs: dL/d(Σ_t log π_θ) = ρ·(β log ρ + αβ log(π_t/π₀) − A + β), whose last term has mean 0.
    There is no clip; the variance of the raw sequence ratio, which grows with length, is what the method is about.

    Args:
        logprobs: [B, T] nats under π_θ; the gradient flows here.
        old_logprobs: [B, T] nats under π_t.
        ref_logprobs: [B, T] nats under π₀; not read, and may be None, where alpha = 0.
        advantages: [B] reward units.
        mask: [B, T] bool, True on sampled tokens.
        alpha: share of the regularisation that goes to π₀, in [0, 1].
        beta: total KL weight, reward units per nat, ≥ 0.

    Returns:
        [B] unreduced. ρ is taken at log ρ bounded to ± `MAX_LOG_RATIO`, against overflow alone: beyond it ρ is a
        constant and only the factor log ρ still has a gradient, back towards π_t.

    Raises:
        ValueError: shapes differ, alpha or beta is out of range, or alpha > 0 without ref_logprobs.

    Derived from the objective of He et al. 2026, arXiv:2602.11523. The paper names DAO as an ablation; its formula was
    not found.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    log_ratio = masked_sum(logprobs - old_logprobs.detach(), mask)
    drift = masked_sum(_drift(old_logprobs, ref_logprobs, alpha), mask)
    return _dual_kl_surrogate(log_ratio, drift, advantages.detach(), alpha, beta)


def dao_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float,
    beta: float,
) -> Tensor:
    """`dao` with the ratio and the KLs of each token: the milder form, without a product over the length.

        L_t = −ρ_t A + αβ ρ_t log(π_θ/π₀)(y_t) + (1−α)β ρ_t log ρ_t

    Equals `dao` for completions of one token. For longer ones it leaves out what a token does to the KL of the tokens
    after it and weighs by one token's ratio, so its optimum is not exactly π*.

    Args:
        logprobs, old_logprobs, ref_logprobs, mask, alpha, beta: as for `dao`.
        advantages: [B] reward units, the same for all tokens of a completion.

    Returns:
        [B, T] unreduced, 0 where the mask is False; ρ_t is bounded as in `dao`.

    Raises:
        ValueError: as for `dao`.

    Derived, as `dao`.
    """
    log_ratio = _token_log_ratio(logprobs, old_logprobs, mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    drift = _drift(old_logprobs, ref_logprobs, alpha)
    losses = _dual_kl_surrogate(log_ratio, drift, advantages.detach().unsqueeze(1), alpha, beta)
    return losses.masked_fill(~mask, 0.0)


def _drift(old_logprobs: Tensor, ref_logprobs: Tensor | None, alpha: float) -> Tensor:
    """log π_t − log π₀ per token, without gradient; 0 where alpha = 0 gives it no weight."""
    if alpha == 0:
        return torch.zeros_like(old_logprobs)
    if ref_logprobs is None:
        raise ValueError(f"alpha = {alpha} regularises towards π₀ and needs ref_logprobs, got None")
    require_same_shape(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    return (old_logprobs - ref_logprobs).detach()


def _dual_kl_surrogate(log_ratio: Tensor, drift: Tensor, advantages: Tensor, alpha: float, beta: float) -> Tensor:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share and must lie in [0, 1], got {alpha}")
    require_not_negative(beta=beta)
    # log(π_θ/π₀) = log ρ + drift: the two penalties are β ρ (log ρ + α·drift).
    ratio = log_ratio.clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO).exp()
    return ratio * (beta * (log_ratio + alpha * drift) - advantages)


def r2vpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, penalty: float) -> Tensor:
    """The surrogate with a penalty on the variance of the ratio in place of a clip, per token.

        L_t = −ρ_t A + λ (ρ_t − 1)²

    The Lagrangian of max E[ρA] subject to E[(ρ − 1)²] ≤ δ; its constant −λδ has no gradient and is left out. The
    gradient −ρ(A − 2λ(ρ − 1)) changes sign at ρ* = 1 + A/(2λ), a soft clip: λ = 2.5 puts it at 1.2 for A = 1.

    Args:
        logprobs: [B, T] nats under π_θ; the gradient flows here.
        old_logprobs: [B, T] nats under π_t.
        advantages: [B, T], or [B] for an advantage shared by all tokens of a completion.
        mask: [B, T] bool, True on sampled tokens.
        penalty: λ ≥ 0, reward units, a constant of the gradient; `dual_step` moves it. 0 leaves −ρA.

    Returns:
        [B, T] unreduced, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or penalty is negative or not finite.

    arXiv:2601.03320 (the objective is in its abstract). The loss and its gradient are derived; the authors' own form
    and their choice between token and sequence ratio were not seen.
    """
    log_ratio = _token_log_ratio(logprobs, old_logprobs, mask)
    require_not_negative(penalty=penalty)
    excess = torch.expm1(log_ratio)
    losses = penalty * excess.square() - (1 + excess) * _token_advantages(advantages, mask)
    return losses.masked_fill(~mask, 0.0)


@torch.no_grad()
def ratio_variance(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(ρ_t − 1)² per token: its mean is the variance of the ratio, whose mean under π_t is 1, i.e. χ²(π_θ‖π_t).

    Args:
        logprobs, old_logprobs: [B, T] nats under π_θ and π_t.
        mask: [B, T] bool, True on sampled tokens.

    Returns:
        [B, T], 0 where the mask is False, no gradient.

    Raises:
        ValueError: shapes differ.
    """
    return torch.expm1(_token_log_ratio(logprobs, old_logprobs, mask)).square()


def dual_step(penalty: float, variance: float, *, target: float, rate: float) -> float:
    """One step of dual ascent on R2VPO's penalty: λ ← max(0, λ + η (variance − δ)).

    Args:
        penalty: λ ≥ 0.
        variance: mean of `ratio_variance` over the kept tokens of the batch.
        target: δ ≥ 0, the variance allowed; ε² = .04 resembles a clip of ε = .2.
        rate: η ≥ 0; 0 keeps λ fixed.

    Returns:
        The new λ ≥ 0.

    Raises:
        ValueError: an argument is negative or not finite.

    Derived: projected gradient ascent on the Lagrangian of `r2vpo`; the authors' update was not seen.
    """
    # max(0, NaN) is 0: a broken batch must not switch the penalty off unseen.
    require_not_negative(penalty=penalty, variance=variance, target=target, rate=rate)
    return max(0.0, penalty + rate * (variance - target))


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The log-likelihood with a clipped importance weight, per token: −sg(clip(ρ_t, 1 − ε_low, 1 + ε_high)) A log π_θ.

    No token loses its gradient, −clip(ρ_t) A: beyond a bound, where PPO's is 0, the weight is the bound. Args, shape
    and errors as `clipped_surrogate`; clip_low = 1 is no lower bound. MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.
    """
    log_ratio = _token_log_ratio(logprobs, old_logprobs, mask)
    weights = log_ratio.detach().clamp(*_log_bounds(clip_low, clip_high)).exp()
    losses = -weights * _token_advantages(advantages, mask) * logprobs.masked_fill(~mask, 0.0)
    return losses.masked_fill(~mask, 0.0)


def dppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, max_shift: float, max_ratio: float
) -> Tensor:
    """`cispo` within a trust region of total variation, per token: −M_t sg(min(ρ_t, C)) A log π_θ.

    M_t is 0 for the tokens `out_of_region`, else 1. Qi et al. 2026, arXiv:2602.04879, with the binary approximation.

    Args:
        logprobs, old_logprobs, advantages, mask: as for `clipped_surrogate`, and so are shape and errors.
        max_shift: δ in [0, 1]; 1 masks nothing.
        max_ratio: C ≥ 1; `math.inf` bounds no weight.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    if not 0 <= max_shift <= 1 or not max_ratio >= 1:
        raise ValueError(f"max_shift must lie in [0, 1] and max_ratio be ≥ 1, got {max_shift} and {max_ratio}")
    per_token = _token_advantages(advantages, mask)
    kept = per_token.masked_fill(out_of_region(logprobs, old_logprobs, per_token, max_shift=max_shift), 0.0)
    return cispo(logprobs, old_logprobs, kept, mask, clip_low=1.0, clip_high=max_ratio - 1)


def out_of_region(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, max_shift: float) -> Tensor:
    """Bool, same shape: |π_θ(y) − π_t(y)| > δ, and A moves y further (π_θ(y) has risen and A > 0, or fallen and A < 0).

    That difference is the total variation between "y" and "not y", and a lower bound of that over the whole vocabulary.
    """
    shift = logprobs.detach().exp() - old_logprobs.exp()
    return (shift.abs() > max_shift) & (shift * advantages > 0)


def kl_to_old(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL(π_θ‖π_t) per token, estimated on samples of π_t: ρ log ρ − (ρ − 1).

    Unbiased because E_{π_t}[ρ log ρ] = KL(π_θ‖π_t) and E_{π_t}[ρ − 1] = 0; never negative because ρ log ρ is convex and
    ρ − 1 its tangent at 1. `dar.ops.kl_k3` would need samples of π_θ. The gradient is ρ log ρ · ∇log π_θ, 0 at ρ = 1.

    Args:
        logprobs: [B, T] nats under π_θ; the gradient flows here.
        old_logprobs: [B, T] nats under π_t.
        mask: [B, T] bool, True on sampled tokens.

    Returns:
        [B, T] nats, unreduced, 0 where the mask is False.

    Raises:
        ValueError: shapes differ.

    Derived. Dual PPO adds (1−α)β times this to PPO's actor loss, and gives −αβ (log π_t − log π₀) as a reward per token
    (`dar.objectives.actor_critic.token_rewards`); the paper that names dual PPO, arXiv:2602.11523, was not found to
    define it.
    """
    log_ratio = _token_log_ratio(logprobs, old_logprobs, mask)
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


def _token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    # Padding may hold anything; filling before the exponential keeps NaN out of the backward pass too.
    return (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)


def _token_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T] without gradient, from [B, T] or from one value per row."""
    if advantages.ndim == 1:
        require_same_shape(advantages=advantages, rows=mask[:, 0])
        advantages = advantages.unsqueeze(1).expand_as(mask)
    require_same_shape(advantages=advantages, mask=mask)
    return advantages.detach()
