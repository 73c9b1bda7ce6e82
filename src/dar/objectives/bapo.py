"""BAPO's adaptive clip bounds: widened until tokens with A > 0 carry a wanted part of the batch's objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dar.ops import require_same_shape


@dataclass(frozen=True)
class BapoBounds:
    """The interval [low, high] in which the ratio ρ = π_θ/π_t is not clipped, and what it reached.

    `share` is the share, or under the criterion "ratio" the ratio, that these bounds reach (1 or ∞ where nothing has
    A < 0); `is_met` tells whether that is the target. Bounds that missed it are the last of the search.
    """

    low: float
    high: float
    share: float
    is_met: bool


@torch.no_grad()
def bapo_bounds(
    ratios: Tensor,
    advantages: Tensor,
    rollout_probs: Tensor | None,
    *,
    target: float,
    low_range: tuple[float, float],
    high_range: tuple[float, float],
    low_step: float,
    high_step: float,
    contribution: Literal["surrogate", "gradient"],
    order: Literal["high_first", "low_first"],
    criterion: Literal["share", "ratio"],
) -> BapoBounds:
    """The first clip bounds on the way from the narrowest to the widest at which positive tokens weigh enough.

        Σ_{A>0} c_t / Σ_t c_t ≥ ρ₀   (share)   or   Σ_{A>0} c_t / Σ_{A<0} c_t ≥ ρ₀   (ratio)

        c_t = p_t |min(ρ_t A_t, clip(ρ_t, low, high) A_t)|   (surrogate)
        c_t = p_t ρ_t |A_t| where the clip is not active, else 0   (gradient)

    The search starts at (low_range[0], high_range[0]), raises one bound step by step to its maximum, then the other,
    and stops where the criterion holds. If it never does, the result is (low_range[1], high_range[1]), unmet; so it is
    for a batch without positive tokens. A batch in which nothing negative contributes needs no search and keeps the
    start. A share ρ₀ is a ratio of ρ₀/(1 − ρ₀).

    The bounds are PPO's: `clipped_surrogate` with clip_low = 1 − low and clip_high = high − 1.

    With "surrogate" raising `low` can only lower the share, since a clipped negative token counts |A|·max(ρ, low): once
    the search is at `low`, it runs to the end. The effect the paper describes, that negative tokens of low ratio drop
    out, is that of "gradient" (derived: a clipped token has no gradient, an unclipped one −ρA).

    Args:
        ratios: [N] ρ of every kept token of the global batch; no padding.
        advantages: [N].
        rollout_probs: [N] p_t = π_roll(y_t), or None for p_t = 1.
        target: ρ₀ ≥ 0; as a share at most 1.
        low_range: (a⁻, b⁻) of the lower bound, 0 ≤ a⁻ ≤ b⁻ ≤ 1.
        high_range: (a⁺, b⁺) of the upper bound, 1 ≤ a⁺ ≤ b⁺. Two equal ends fix a bound.
        low_step, high_step: > 0; the last step is cut at the end of the range.
        contribution: what a token counts, c_t.
        order: the bound raised first.
        criterion: share of all, or ratio to the negative.

    Returns:
        Bounds as floats; no gradient.

    Raises:
        ValueError: tensors are not of one shape [N], or a range, step or target is impossible.

    arXiv:2510.18927. As a summary of the paper has it: "surrogate", "share", "high_first", with π_roll. As the authors'
    released code has it: "surrogate", "ratio", "low_first", without π_roll; it also bounds log ρ to ±20 before, adds a
    small constant to the denominator, and uses the dual clip of 3 for A < 0, none of which is done here.
    """
    if ratios.ndim != 1:
        raise ValueError(f"bapo_bounds takes the kept tokens as one row [N], got ratios of shape {list(ratios.shape)}")
    require_same_shape(ratios=ratios, advantages=advantages)
    if not 0 <= low_range[0] <= low_range[1] <= 1:
        raise ValueError(f"low_range must rise within [0, 1], got {low_range}")
    if not 1 <= high_range[0] <= high_range[1] < math.inf:
        raise ValueError(f"high_range must rise from 1 or more and be finite, got {high_range}")
    if not (low_step > 0 and high_step > 0):
        raise ValueError(f"low_step and high_step must be > 0, got {low_step} and {high_step}")
    if not 0 <= target < math.inf or (criterion == "share" and target > 1):
        raise ValueError(f"target must be ≥ 0 and finite, and at most 1 as a share, got {target} as a {criterion}")
    weights = advantages.double().abs()
    if rollout_probs is not None:
        require_same_shape(ratios=ratios, rollout_probs=rollout_probs)
        weights = weights * rollout_probs.double()
    ratios = ratios.double()
    is_positive, is_negative = advantages > 0, advantages < 0
    positive_ratios, positive_weights = ratios[is_positive], weights[is_positive]
    negative_ratios, negative_weights = ratios[is_negative], weights[is_negative]

    def judged(low: float, high: float) -> BapoBounds:
        if contribution == "surrogate":
            positive = positive_ratios.clamp(max=high)
            negative = negative_ratios.clamp(min=low)
        else:
            positive = positive_ratios.masked_fill(positive_ratios > high, 0.0)
            negative = negative_ratios.masked_fill(negative_ratios < low, 0.0)
        positive_sum = float((positive_weights * positive).sum())
        negative_sum = float((negative_weights * negative).sum())
        if negative_sum == 0:
            share = math.inf if criterion == "ratio" else 1.0
        else:
            share = positive_sum / (negative_sum if criterion == "ratio" else positive_sum + negative_sum)
        return BapoBounds(low, high, share, is_met=share >= target)

    lows, highs = _steps(low_range, low_step), _steps(high_range, high_step)
    if order == "high_first":
        path = [(lows[0], high) for high in highs] + [(low, highs[-1]) for low in lows[1:]]
    else:
        path = [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]
    found = (judged(low, high) for low, high in path)
    return next((bounds for bounds in found if bounds.is_met), None) or judged(*path[-1])


def _steps(ends: tuple[float, float], step: float) -> list[float]:
    """start, start + step, … and the end itself. Multiples of the step do not drift as a running sum does."""
    start, end = ends
    # 36 steps of .05 fill 1.2 … 3.0, yet (3.0 − 1.2)/.05 is 36.00000000000001.
    num_steps = math.ceil((end - start) / step - 1e-9)
    return [start + index * step for index in range(num_steps)] + [end]
