"""Statistics of sampled text."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from scipy.stats import rankdata
from torch import Tensor

from dar.batch import Rollouts
from dar.record.ngrams import distinct_n, group_overlap, longest_repeat_share


def text_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths and endings under TRL's names, and how much completions repeat themselves and each other.

    `completions/clipped_ratio` is the share that ran out of room, the missing-EOS rate. What does not exist is left
    out: the length of those that ended, where none did; the overlap within a group of one.
    """
    lengths = rollouts.groups.lengths.float()
    ended = rollouts.has_eos
    rows = token_rows(rollouts)
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/p95_length": float(lengths.quantile(0.95)),
        "completions/clipped_ratio": float((~ended).float().mean()),
        **{f"completions/distinct_{n}": distinct_n(rows, n) for n in (1, 2, 3)},
        "completions/repetition": fmean(longest_repeat_share(row) for row in rows),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    size = rollouts.num_generations
    overlaps = [group_overlap(rows[start : start + size], 2) for start in range(0, len(rows), size)]
    if found := [overlap for overlap in overlaps if overlap is not None]:
        metrics["completions/group_overlap_2"] = fmean(found)
    return metrics


def reward_length_metrics(rewards: Tensor, lengths: Tensor) -> dict[str, float]:
    """How far the reward goes with the length: Pearson's and Spearman's correlation, and a share of the variance.

        r2_within = corr(r − r̄_prompt, T − T̄_prompt)²

    the share of the rewards' variance around their prompts' means that a line in the length explains: what a group
    baseline leaves, and advantages are made of. (Over the whole batch the share is Pearson's correlation squared.)
    Where rewards or lengths do not vary there is no correlation, and the metric is left out.

    Args:
        rewards: [P, K], NaN where a completion has none; those are left out.
        lengths: [P·K] tokens, group-major.
    """
    scored = ~rewards.isnan()
    reward, length = rewards.double(), lengths.double().reshape(rewards.shape).masked_fill(~scored, math.nan)
    both = (reward[scored], length[scored])
    ranks = [torch.from_numpy(rankdata(values)) for values in both]
    # Of K equal fp32 values the float64 mean is exact, so that what does not vary is exactly 0 here.
    centered = [(values - values.nanmean(1, keepdim=True))[scored] for values in (reward, length)]
    within = _correlation(*centered)
    found = {
        "reward_length/pearson": _correlation(*both),
        "reward_length/spearman": _correlation(*ranks),
        "reward_length/r2_within": None if within is None else within**2,
    }
    return {name: value for name, value in found.items() if value is not None}


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation of two vectors; None where they are empty, or either is constant."""
    if len(one) == 0 or one.min() == one.max() or other.min() == other.max():
        return None
    return float(torch.corrcoef(torch.stack((one, other)))[0, 1])


def token_rows(rollouts: Rollouts) -> list[list[int]]:
    """Each completion's token ids, EOS included, padding removed."""
    ids, mask = rollouts.groups.completion_ids, rollouts.groups.mask
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def sampled_entropy(rollouts: Rollouts) -> float:
    """−mean log π(y_t): an unbiased estimate of the mean per-token entropy along the policy's own samples, nats."""
    return float(-rollouts.logprobs[rollouts.groups.mask].double().mean())
