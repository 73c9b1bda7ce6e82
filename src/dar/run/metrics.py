"""What a training step's samples say of the policy that drew them."""

from __future__ import annotations

from torch import Tensor

from dar.advantages import tied_groups
from dar.algorithms.base import Metrics, kl_metrics
from dar.batch import Rollouts
from dar.rewards import RewardTable
from dar.run.images import image_metrics
from dar.run.text import reward_length_metrics, sampled_entropy, text_metrics


def sample_metrics(rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None) -> Metrics:
    """Rewards, lengths, endings, repetition, entropy and, where the reference was read, KL to π₀."""
    metrics: Metrics = {
        **rewards.metrics(),
        "frac_reward_zero_std": float(tied_groups(rewards.total).float().mean()),
        "entropy": sampled_entropy(rollouts),
        **completion_metrics(rollouts),
        **reward_length_metrics(rewards.total, rollouts.groups.lengths),
    }
    if ref_logprobs is not None:
        metrics |= kl_metrics(rollouts.logprobs, ref_logprobs, rollouts.groups.mask, name="ref")
        metrics["kl"] = metrics["kl/ref_k3_per_token"]  # TRL's name for it
    return metrics


def completion_metrics(rollouts: Rollouts) -> Metrics:
    """What completions are like, by what they are."""
    return text_metrics(rollouts) if rollouts.images is None else image_metrics(rollouts)
