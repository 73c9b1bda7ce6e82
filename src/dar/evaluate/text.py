"""Statistics of sampled text."""

from __future__ import annotations

from collections.abc import Sequence

from dar.batch import Rollouts


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams / all n-grams, over all rows together: falls as texts repeat themselves or each other.

    Depends on the number of rows; compare only equal numbers.

    Args:
        rows: token ids.
        n: length of the n-grams, ≥ 1.

    Returns:
        A share in (0, 1], or 0 when no row has n tokens.

    Li et al. 2016, arXiv:1510.03055.
    """
    grams = [tuple(row[start : start + n]) for row in rows for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def completion_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths and endings under TRL's names, and distinct-2.

    `completions/clipped_ratio` is the share that ran out of room, the missing-EOS rate.
    """
    lengths = rollouts.groups.lengths().float()
    ended = rollouts.has_eos
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~ended).float().mean()),
        "completions/distinct_2": distinct_n(token_rows(rollouts), 2),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return metrics


def token_rows(rollouts: Rollouts) -> list[list[int]]:
    """Each completion's token ids, EOS included, padding removed."""
    ids, mask = rollouts.groups.completion_ids, rollouts.groups.mask
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def sampled_entropy(rollouts: Rollouts) -> float:
    """−mean log π(y_t): an unbiased estimate of the mean per-token entropy along the policy's own samples, nats."""
    return float(-rollouts.logprobs[rollouts.groups.mask].double().mean())
