"""What PPO with a critic adds to the surrogate: rewards per token, whitened advantages and the critic's loss.

Advantages come from `dar.advantages.gae`, the actor's loss from `dar.objectives.policy_gradient.clipped_surrogate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dar.advantages import batch_standardized
from dar.ops import require_not_negative, require_positive, require_same_shape


@torch.no_grad()
def token_rewards(
    rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, *, kl_coef: float
) -> Tensor:
    """RLHF's reward per token: a KL penalty on every token, the completion's reward on its last one.

        R_t = −c_KL · [log π_t(y_t) − log π₀(y_t)] + 1[t is the last sampled token] · r

    Args:
        rewards: [B] reward units.
        old_logprobs: [B, T] nats under π_t, the policy that sampled.
        ref_logprobs: [B, T] nats under π₀; not read, and may be None, where kl_coef = 0.
        mask: [B, T] bool, True on sampled tokens, EOS included.
        kl_coef: c_KL ≥ 0, reward units per nat; dual PPO has αβ here.

    Returns:
        [B, T] reward units, 0 where the mask is False, no gradient; a row sums to r − c_KL · Σ_t log(π_t/π₀).

    Raises:
        ValueError: shapes differ, kl_coef is negative or not finite, or kl_coef > 0 without ref_logprobs.

    The estimator of the KL is k1, as in TRL's PPO trainer by default.
    """
    require_same_shape(old_logprobs=old_logprobs, mask=mask)
    require_same_shape(rewards=rewards, rows=mask[:, 0])
    require_not_negative(kl_coef=kl_coef)
    # Counted from the right, the first kept token is the last one sampled.
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    per_token = torch.where(is_last, rewards.unsqueeze(1), 0.0)
    if kl_coef == 0:
        return per_token
    if ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} penalises distance from π₀ and needs ref_logprobs, got None")
    require_same_shape(ref_logprobs=ref_logprobs, mask=mask)
    return per_token - kl_coef * (old_logprobs - ref_logprobs).masked_fill(~mask, 0.0)


@torch.no_grad()
def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of mean 0 and standard deviation 1 over all kept tokens of the batch, 0 where the mask is False.

    Args:
        advantages: [B, T] of the global batch.
        mask: [B, T] bool, True on sampled tokens.

    Returns:
        [B, T] in standard deviations (ddof 1), no gradient; all 0 where the kept tokens are equal or fewer than two.

    Raises:
        ValueError: shapes differ.

    `dar.advantages.batch_standardized` over tokens. TRL's `masked_whiten` divides by the root of the unbiased variance
    (ddof 1) plus 1e-8, where this adds 1e-8 to the standard deviation.
    """
    require_same_shape(advantages=advantages, mask=mask)
    kept = advantages[mask]
    result = torch.zeros_like(advantages)
    if kept.numel() >= 2:
        result[mask] = batch_standardized(kept, ddof=1)
    return result


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_value: float
) -> Tensor:
    """The critic's loss, per token: ½ max( (V − G)², (clip(V, V_old − ε_v, V_old + ε_v) − G)² ).

    The gradient is V − G, and 0 where V has left V_old ± ε_v and is nearer to G than the bound it crossed: a step away
    from G is never cut.

    Args:
        values: [B, T] V of the critic being trained; the gradient flows here.
        old_values: [B, T] V of the critic when the batch was sampled.
        returns: [B, T] G = Â + V_old, with Â before whitening.
        mask: [B, T] bool, True on sampled tokens.
        clip_value: ε_v > 0 in reward units; `math.inf` turns clipping off.

    Returns:
        [B, T] unreduced, 0 where the mask is False.

    Raises:
        ValueError: shapes differ or clip_value ≤ 0.

    As in TRL's PPO trainer (ε_v = .2, and a coefficient of .1 on the mean).
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    require_positive(clip_value=clip_value)
    # Padding may hold anything; filling before the square keeps NaN out of the backward pass too.
    values = values.masked_fill(~mask, 0.0)
    old_values = old_values.detach().masked_fill(~mask, 0.0)
    returns = returns.detach().masked_fill(~mask, 0.0)
    bounded = values.clamp(min=old_values - clip_value, max=old_values + clip_value)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square())
