"""What held-out pairs say about a reward model: accuracy, calibration, and what length alone would have said."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import expit

from dar.record.intervals import standard_error

_EDGES = (-64, -16, 0, 1, 17, 65)
"""Where bins of the chosen completion's length less the rejected one's begin, in tokens: −64 to −17, −16 to −1, 0, …"""


def preference_report(chosen: Sequence[float], rejected: Sequence[float], longer_by: Sequence[int]) -> dict[str, Any]:
    """Figures of a reward model on pairs.

    Args:
        chosen, rejected: scores of each pair's completions.
        longer_by: tokens of the chosen completion less those of the rejected one.

    Returns:
        `num_pairs`; `accuracy` (a tie counts half) with `accuracy_se`; `loss`, the mean −log σ(r_c − r_r) in nats;
        `mean_margin`; `ece` and its `reliability` bins; `by_length_difference`; and for comparison
        `longer_wins_accuracy` and `shorter_wins_accuracy`, with `length_se`.

    Raises:
        ValueError: there are no pairs, or the columns' lengths differ.
    """
    if not chosen or not len(chosen) == len(rejected) == len(longer_by):
        raise ValueError(f"expected equally many, got {len(chosen)}, {len(rejected)} and {len(longer_by)}")
    margins = [better - worse for better, worse in zip(chosen, rejected)]
    right, longer = [_points(margin) for margin in margins], [_points(difference) for difference in longer_by]
    ece, bins = calibration_error(margins)
    return {
        "num_pairs": len(margins),
        "accuracy": fmean(right),
        "accuracy_se": standard_error(right),
        "loss": fmean(np.logaddexp(0.0, np.negative(margins))),
        "mean_margin": fmean(margins),
        "ece": ece,
        "longer_wins_accuracy": fmean(longer),
        "shorter_wins_accuracy": 1 - fmean(longer),
        "length_se": standard_error(longer),
        "reliability": bins,
        "by_length_difference": _by_length(right, longer_by),
    }


def calibration_error(margins: Sequence[float]) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error of the probability σ(|margin|) a model gives to the completion it prefers.

        ECE = Σ_b n_b / n · |accuracy_b − confidence_b|   over ten bins of equal width in [1/2, 1]

    Args:
        margins: r_c − r_r of each pair.

    Returns:
        The error in [0, 1], and the bins that hold pairs: `confidence`, `accuracy`, `num_pairs`.

    Guo et al. 2017, arXiv:1706.04599, eq. 3, for the two completions of a pair.
    """
    right, confidence = np.array([_points(margin) for margin in margins]), expit(np.abs(margins))
    places = np.minimum(9, ((2 * confidence - 1) * 10).astype(int))
    bins = [
        {
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
            "num_pairs": int((places == place).sum()),
        }
        for place in np.unique(places)
    ]
    error = sum(part["num_pairs"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(margins)
    return error, bins


def _by_length(right: Sequence[float], longer_by: Sequence[int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    places = np.digitize(longer_by, _EDGES)
    for place, (low, stop) in enumerate(pairwise((None, *_EDGES, None))):
        part = [points for points, own in zip(right, places) if own == place]
        if part:
            high = None if stop is None else stop - 1
            found.append(
                {"from": low, "to": high, "num_pairs": len(part), "accuracy": fmean(part), "se": standard_error(part)}
            )
    return found


def _points(margin: float) -> float:
    """1 where the first is preferred, 0 where the other is, 1/2 for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)
