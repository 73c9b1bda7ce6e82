"""Advantage estimators: rewards in, advantages out. Pure functions on [P, K] (prompts × completions).

NaN marks a completion that has no reward (`Failed`, dropped): it counts in no statistic, and stays NaN. Another that is
left alone in its group has nothing to be compared with: 0.

Statistics are meant to be taken over the **global** batch, never over a micro-batch: the trainer calls these once per
step with every row of every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dar.errors import RewardError
from dar.ops import require_same_shape

ROUNDING = 2.0**-20
"""Rewards that differ by no more than this share of the larger one are equal: 8 units in the last place of fp32. It is
what adding up a few terms in another order changes, and no standardisation may make advantages of it."""


def group_mean(rewards: Tensor) -> Tensor:
    """A = r − mean_k r: the Monte-Carlo baseline of the group, the sample itself included.

    With K = 1 that baseline would cancel every reward; then A = r, and a batch normalisation afterwards supplies the
    batch mean as the baseline.

    Args:
        rewards: [P, K] reward units.

    Returns:
        [P, K] reward units.

    Raises:
        ValueError: not two-dimensional or empty.

    He et al. 2025, arXiv:2504.14177 (the estimator of DAR).
    """
    _require_groups(rewards)
    if rewards.shape[1] == 1:
        return rewards.clone()
    # A tied group must give an exact 0: (a + a + a) / 3 need not be a in floating point.
    return _zero_where_tied(rewards - rewards.nanmean(dim=1, keepdim=True), rewards)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i − (1/(K−1)) Σ_{j≠i} r_j = K/(K−1) · (r_i − mean r): the baseline never sees its own sample.

    Args:
        rewards: [P, K] reward units, K ≥ 2.

    Returns:
        [P, K] reward units; each row sums to 0.

    Raises:
        ValueError: not two-dimensional, empty, or K = 1 (there is nothing left to average).

    Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, eq. 8.
    """
    _require_groups(rewards)
    num_generations = rewards.shape[1]
    if num_generations < 2:
        raise ValueError("leave_one_out needs at least 2 completions per prompt: with 1 there is nothing to average")
    count = _count(rewards)
    return group_mean(rewards) * (count / (count - 1).clamp(min=1))


def group_standardized(rewards: Tensor, *, ddof: int, eps: float) -> Tensor:
    """A = (r − mean_k r) / (std_k r + ε), per prompt; a tied group gives exactly 0.

    Args:
        rewards: [P, K] reward units, K ≥ 2.
        ddof: 0 for the population standard deviation, 1 for the sample one (TRL's choice).
        eps: added to the standard deviation.

    Returns:
        [P, K] in standard deviations of the group.

    Raises:
        ValueError: not two-dimensional, empty, or K = 1.

    Shao et al. 2024, arXiv:2402.03300, §4.1.1.
    """
    _require_groups(rewards)
    if rewards.shape[1] < 2:
        raise ValueError("group_standardized needs at least 2 completions per prompt: one has no spread")
    centred = group_mean(rewards)
    variance = centred.square().nansum(dim=1, keepdim=True) / (_count(rewards) - ddof).clamp(min=1)
    # With eps = 0 a tied group would be 0 / 0.
    return _zero_where_tied(centred / (variance.sqrt() + eps), rewards)


def over_mean(rewards: Tensor) -> Tensor:
    """A = (r − mean_k r) / mean_k r, per prompt; a tied group gives exactly 0, and so do zeros alone or K = 1.

    For rewards of 0 and 1, with p the probability of success, the mean of A ∇log π over the group has the expectation
    (1 − (1 − p)^(K−1))/p · ∇p: ∇p for K = 2, ∇log p for K → ∞. For others it estimates ∇log E[r], whatever their unit.

    Args:
        rewards: [P, K] ≥ 0.

    Returns:
        [P, K] in [−1, K − 1].

    Raises:
        ValueError: not two-dimensional or empty.
        RewardError: a reward is below 0; a mean below 0 would turn the gradient around.

    Tajwar et al. 2026 (MaxRL), arXiv:2602.02710, for rewards of 0 and 1; for others derived.
    """
    _require_groups(rewards)
    if (rewards < 0).any():
        raise RewardError(
            f"advantages over the group's mean (maxrl) need rewards ≥ 0, got {rewards[rewards < 0].min():g}: give the "
            "reward a `threshold`, from which on it is 1 and below it 0"
        )
    return _zero_where_tied(group_mean(rewards) / rewards.nanmean(dim=1, keepdim=True), rewards)


def batch_standardized(advantages: Tensor, *, ddof: int = 0, eps: float = 1e-8) -> Tensor:
    """Â = (A − mean A) / (std A + ε) over the whole batch; a batch equal but for `ROUNDING` gives exactly 0.

    Args:
        advantages: [P, K] (any shape), every row of the global batch.
        ddof: 0 (default, as AWR's released code) or 1.
        eps: added to the standard deviation.

    Returns:
        Same shape, in standard deviations of the batch.

    Raises:
        ValueError: empty, or ddof leaves no degree of freedom.
    """
    values = advantages[~advantages.isnan()]
    if values.numel() <= ddof:
        raise ValueError(f"batch_standardized needs more than {ddof} values, got {values.numel()}")
    if is_tied(values.reshape(1, -1)):
        return advantages * 0.0
    return (advantages - values.mean()) / (values.std(correction=ddof) + eps)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: Â_t = Σ_l (γλ)^l δ_{t+l}, δ_t = R_t + γ V_{t+1} − V_t.

    Args:
        rewards: [B, T] per-token rewards; what stands where the mask is False is not read.
        values: [B, T] the critic's V(s_t), in reward units.
        mask: [B, T] bool, True on sampled tokens. V after the last one is 0.
        gamma: discount in [0, 1].
        lam: λ in [0, 1]; 0 gives the one-step δ, 1 (with γ = 1) the return minus V.

    Returns:
        [B, T], 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or gamma or lam outside [0, 1].

    Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following_value = rewards.new_zeros(rewards.shape[0])
    following_advantage = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * following_advantage
        # What the policy did not choose lies between one of its choices and the next, and takes no time.
        following_advantage = torch.where(mask[:, t], advantages[:, t], following_advantage)
        following_value = torch.where(mask[:, t], values[:, t], following_value)
    return advantages.masked_fill(~mask, 0.0)


def tied_groups(rewards: Tensor) -> Tensor:
    """[P] bool: True where all rewards of a prompt (with K = 1, of the batch) are equal but for `ROUNDING`."""
    _require_groups(rewards)
    groups = rewards.T if rewards.shape[1] == 1 else rewards
    return is_tied(groups).squeeze(1).expand(len(rewards))


def is_tied(rewards: Tensor) -> Tensor:
    """[P, K] → [P, 1] bool: whether those of a row that are there (not NaN) are equal but for `ROUNDING`."""
    lowest = rewards.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(dim=1, keepdim=True)
    highest = rewards.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1, keepdim=True)
    return (lowest >= highest) | (highest - lowest <= ROUNDING * torch.maximum(lowest.abs(), highest.abs()))


def first_best(rewards: Tensor) -> Tensor:
    """[P, K] → [P, 1]: where the highest reward of a row is, the first of equals; NaN is none."""
    highest = rewards.masked_fill(rewards.isnan(), -torch.inf).amax(dim=1, keepdim=True)
    # argmax does not promise which of several maxima it returns; the first equal to the maximum is well defined.
    return (rewards == highest).to(torch.uint8).argmax(dim=1, keepdim=True)


def _zero_where_tied(advantages: Tensor, rewards: Tensor) -> Tensor:
    return torch.where(is_tied(rewards) & ~rewards.isnan(), torch.zeros_like(advantages), advantages)


def _count(rewards: Tensor) -> Tensor:
    return (~rewards.isnan()).sum(dim=1, keepdim=True).to(rewards.dtype)


def _require_groups(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.numel() == 0:
        raise ValueError(f"rewards must be [prompts, completions] and not empty, got shape {list(rewards.shape)}")
