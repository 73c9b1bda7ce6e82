"""What a training step's samples say of the policy that drew them."""

from __future__ import annotations

from torch import Tensor

from dar.algorithms.base import Metrics, kl_metrics
from dar.batch import Rollouts
from dar.record.text import reward_length_metrics, sampled_entropy, text_metrics
from dar.rewards import RewardTable


def sample_metrics(rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None) -> Metrics:
    """Rewards, lengths, endings, repetition, entropy and, where the reference was read, KL to π₀."""
    metrics: Metrics = {
        **rewards.metrics(),
        "entropy": sampled_entropy(rollouts),
        **completion_metrics(rollouts),
        **reward_length_metrics(rewards.total, rollouts.groups.lengths),
    }
    if ref_logprobs is not None:
        metrics |= kl_metrics(rollouts.logprobs, ref_logprobs, rollouts.groups.mask, name="ref")
        metrics["kl"] = metrics["kl/ref_k3_per_token"]  # TRL's name for it
    return metrics


def completion_metrics(rollouts: Rollouts) -> Metrics:
    """What completions are like; of images, brightness and the RMS difference of a pixel between two of a prompt."""
    if rollouts.images is None:
        return text_metrics(rollouts)
    groups = rollouts.images.double().flatten(1).unflatten(0, (-1, rollouts.num_generations))
    # Of two values drawn without replacement the squared difference is on average twice the variance.
    distance = (2 * groups.var(1)).mean().sqrt() if rollouts.num_generations > 1 else 0.0
    return {"images/brightness": float(groups.mean()), "images/group_distance": float(distance)}


def gold_metrics(table: RewardTable | None) -> Metrics:
    """`gold`, the mean weighted sum, and `gold/<name>/…` of each held-out reward: its mean, and what it logged."""
    if table is None:
        return {}
    found = table.metrics()
    keys = [key for key in (*(f"rewards/{name}/mean" for name in table.parts), *table.logged) if key in found]
    return {"gold": found["reward"], **{key.replace("rewards", "gold", 1): found[key] for key in keys}}
