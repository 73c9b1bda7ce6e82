"""BAPO's search for clip bounds: the shares of five tokens worked by hand, the path of the search, and its ends."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import few
from torch import Tensor

from dar.objectives.bapo import BapoBounds, bapo_bounds
from dar.objectives.policy_gradient import clipped_surrogate

INF, NAN = math.inf, math.nan
RATIOS = torch.tensor([1.5, 1.1, 0.7, 0.9, 1.3], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 0.5, -1.0, -0.5, -1.0], dtype=torch.float64)
ROLLOUT_PROBS = torch.tensor([0.3, 0.6, 0.5, 0.9, 0.2], dtype=torch.float64)
PAPER: dict[str, Any] = {
    "target": 0.4,
    "low_range": (0.6, 0.9),
    "high_range": (1.2, 3.0),
    "low_step": 0.02,
    "high_step": 0.05,
    "contribution": "surrogate",
    "order": "high_first",
    "criterion": "share",
}


def search(
    ratios: Tensor = RATIOS,
    advantages: Tensor = ADVANTAGES,
    rollout_probs: Tensor | None = ROLLOUT_PROBS,
    **changes: Any,
) -> BapoBounds:
    return bapo_bounds(ratios, advantages, rollout_probs, **{**PAPER, **changes})


def share_at(
    low: float,
    high: float,
    ratios: Tensor = RATIOS,
    advantages: Tensor = ADVANTAGES,
    *,
    rollout_probs: Tensor | None = ROLLOUT_PROBS,
    **changes: Any,
) -> float:
    """What two fixed bounds reach."""
    return search(ratios, advantages, rollout_probs, low_range=(low, low), high_range=(high, high), **changes).share


def random_tokens(seed: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_ratios, advantages = torch.randn(2, count, dtype=torch.float64, generator=generator)
    return (0.5 * log_ratios).exp(), advantages, torch.rand(count, dtype=torch.float64, generator=generator)


# --- what a token counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "positive", "negative"),
    [
        # A > 0: .3·min(1.5, high) + .6·.5·1.1.  A < 0: .5·max(.7, low) + .9·.5·max(.9, low) + .2·1.3.
        (0.6, 1.2, 0.69, 1.015),
        (0.6, 1.6, 0.78, 1.015),
        (0.9, 1.2, 0.69, 1.115),
        (0.9, 3.0, 0.78, 1.115),
    ],
)
def test_surrogate_share_of_the_golden_tokens(low: float, high: float, positive: float, negative: float):
    assert share_at(low, high) == pytest.approx(positive / (positive + negative), rel=1e-12)
    # Without π_roll every token weighs 1: 1.2 + .55 against .7 + .45 + 1.3.
    for probs in (None, torch.ones(5)):
        assert share_at(0.6, 1.2, rollout_probs=probs) == pytest.approx(1.75 / 4.2, rel=1e-12)
    assert share_at(low, high, criterion="ratio") == pytest.approx(positive / negative, rel=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "positive", "negative"),
    [
        # Clipped tokens count nothing: 1.5 above 1.2, .7 below .75.
        (0.6, 1.2, 0.33, 1.015),
        (0.6, 1.6, 0.78, 1.015),
        (0.75, 1.2, 0.33, 0.665),
        (0.75, 1.6, 0.78, 0.665),
        # A ratio on the bound is not clipped.
        (0.7, 1.5, 0.78, 1.015),
    ],
)
def test_gradient_share_of_the_golden_tokens(low: float, high: float, positive: float, negative: float):
    share = share_at(low, high, contribution="gradient")
    assert share == pytest.approx(positive / (positive + negative), rel=1e-12)


@few
@given(seed=st.integers(0, 10_000), low=st.floats(0.3, 1), high=st.floats(1, 3))
def test_contributions_are_the_clipped_surrogate_and_its_gradient(seed: int, low: float, high: float):
    ratios, advantages, probs = random_tokens(seed)
    logprobs = ratios.log().unsqueeze(1).requires_grad_()
    mask = torch.ones(40, 1, dtype=torch.bool)
    losses = clipped_surrogate(
        logprobs, torch.zeros_like(logprobs), advantages, mask, clip_low=1 - low, clip_high=high - 1
    )
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    for contribution, amounts in (("surrogate", losses.detach()), ("gradient", grad)):
        counted = probs * amounts.abs().flatten()
        expected = float(counted[advantages > 0].sum() / counted.sum())
        share = share_at(low, high, ratios, advantages, rollout_probs=probs, contribution=contribution)
        assert share == pytest.approx(expected, rel=1e-12)


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contribution", "target", "low", "high", "share", "is_met"),
    [
        ("surrogate", 0.4, 0.6, 1.2, 0.69 / 1.705, True),
        # (.33 + .3·high)/(1.345 + .3·high) ≥ .43 from high = 1.45234 on: .429775 at 1.45.
        ("surrogate", 0.43, 0.6, 1.5, 0.78 / 1.795, True),
        ("surrogate", 0.5, 0.9, 3.0, 0.78 / 1.895, False),
        # The token of ratio 1.5 enters at 1.5, that of .7 leaves once the bound is above it.
        ("gradient", 0.4, 0.6, 1.5, 0.78 / 1.795, True),
        ("gradient", 0.5, 0.72, 3.0, 0.78 / 1.445, True),
    ],
)
def test_search_of_the_golden_tokens(
    contribution: str, target: float, low: float, high: float, share: float, is_met: bool
):
    bounds = search(target=target, contribution=contribution)
    assert bounds.low == pytest.approx(low, rel=1e-12)
    assert bounds.high == pytest.approx(high, rel=1e-12)
    assert bounds.share == pytest.approx(share, rel=1e-12)
    assert bounds.is_met is is_met


GRADIENT = {"contribution": "gradient"}
LOW_FIRST = {"order": "low_first"}
about = partial(pytest.approx, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        # The ends are exact: a running sum of 36 steps of .05 from 1.2 ends at 2.999999999999997, 15 of .02 from .6 at
        # .9000000000000002. Where the steps do not divide the range the last one is cut.
        ({"target": 0.5}, 0.9, 3.0),
        ({"target": 0.5, "low_step": 0.07, "high_step": 10.0}, 0.9, 3.0),
        # For the gradient share either bound alone helps: 1.5 enters at high = 1.5, .7 leaves at low = .72.
        ({"target": 0.33, **GRADIENT}, 0.6, about(1.5)),
        ({"target": 0.33, **GRADIENT, **LOW_FIRST}, about(0.72), 1.2),
        # Low alone reaches .33/.995 (the token of .9 lies on the last bound and stays in), so high follows.
        ({"target": 0.5, **GRADIENT, **LOW_FIRST}, 0.9, about(1.5)),
    ],
)
def test_order_tells_which_bound_is_raised_first(changes: dict[str, Any], low: Any, high: Any):
    bounds = search(**changes)
    assert (bounds.low, bounds.high) == (low, high)


@pytest.mark.parametrize(
    ("ratios", "changes", "low", "high"),
    [
        # The positive token's gradient enters with the first bound above it: 1.2, 1.25, 1.3, multiples of the step.
        ([1.29, 1.0], {}, 0.6, 1.2 + 2 * 0.05),
        # The range ends between two steps: 1.2, 1.27, 1.28.
        ([1.275, 1.0], {"high_range": (1.2, 1.28), "high_step": 0.07}, 0.6, 1.28),
        # 1.22 enters with the very first step of the upper bound, .61 leaves with that of the lower one.
        ([1.22, 1.0], {}, 0.6, 1.25),
        ([1.22, 1.0], LOW_FIRST, 0.9, 1.25),
        ([1.0, 0.61], {"target": 1.0}, 0.62, 3.0),
        ([1.0, 0.61], {"target": 1.0, **LOW_FIRST}, 0.62, 1.2),
    ],
)
def test_every_step_of_either_bound_is_tried(ratios: list[float], changes: dict[str, Any], low: float, high: float):
    bounds = search(torch.tensor(ratios), torch.tensor([1.0, -1.0]), None, **{**GRADIENT, **changes})
    assert (bounds.low, bounds.high, bounds.is_met) == (low, high, True)


def test_as_the_authors_released_code_has_it():
    # Without π_roll the ratio of sums is 1.75/2.45 at the start. Raising the lower bound to .8 makes it 1.75/2.55, so
    # the first loop runs to its end in vain; then (.55 + min(1.5, high))/2.55 reaches .75 at high = 1.3625, i.e. 1.4.
    code: dict[str, Any] = {
        "low_range": (0.6, 0.8),
        "high_range": (1.2, 2.0),
        "low_step": 0.05,
        "order": "low_first",
        "criterion": "ratio",
    }
    bounds = search(rollout_probs=None, target=0.75, **code)
    assert (bounds.low, bounds.high) == (0.8, pytest.approx(1.4, rel=1e-12))
    assert bounds.share == pytest.approx(1.95 / 2.55, rel=1e-12)
    unmet = search(rollout_probs=None, target=1.0, **code)
    assert (unmet.low, unmet.high, unmet.is_met) == (0.8, 2.0, False)
    assert unmet.share == pytest.approx(2.05 / 2.55, rel=1e-12)


@pytest.mark.parametrize("order", ["high_first", "low_first"])
@pytest.mark.parametrize("contribution", ["surrogate", "gradient"])
def test_criterion_met_at_the_start_moves_nothing(order: str, contribution: str):
    # The start is the answer where it reaches exactly the target, too.
    target = share_at(0.6, 1.2, contribution=contribution)
    bounds = search(target=target, order=order, contribution=contribution)
    assert bounds == BapoBounds(0.6, 1.2, target, is_met=True)


@pytest.mark.parametrize("contribution", ["surrogate", "gradient"])
@pytest.mark.parametrize(("criterion", "share"), [("share", 1.0), ("ratio", INF)])
@pytest.mark.parametrize("sign", [1.0, 0.0])
def test_batch_without_negative_tokens_is_not_searched(contribution: str, criterion: str, share: float, sign: float):
    bounds = search(
        RATIOS, sign * ADVANTAGES.abs(), contribution=contribution, criterion=criterion, target=1.0, order="low_first"
    )
    assert bounds == BapoBounds(0.6, 1.2, share, is_met=True)


@pytest.mark.parametrize("contribution", ["surrogate", "gradient"])
@pytest.mark.parametrize("criterion", ["share", "ratio"])
@pytest.mark.parametrize("order", ["high_first", "low_first"])
def test_batch_without_positive_tokens_runs_to_the_end(contribution: str, criterion: str, order: str):
    bounds = search(RATIOS, -ADVANTAGES.abs(), contribution=contribution, criterion=criterion, order=order)
    assert bounds == BapoBounds(0.9, 3.0, 0.0, is_met=False)


@few
@given(seed=st.integers(0, 10_000), contribution=st.sampled_from(["surrogate", "gradient"]))
def test_share_never_falls_with_the_upper_bound(seed: int, contribution: str):
    *tokens, probs = random_tokens(seed)
    shares = [
        share_at(0.7, high, *tokens, rollout_probs=probs, contribution=contribution) for high in (1.0, 1.2, 1.7, 3.0)
    ]
    assert shares == sorted(shares)


@few
@given(seed=st.integers(0, 10_000))
def test_lower_bound_lowers_the_surrogate_share_and_raises_the_gradient_share(seed: int):
    # |min(ρA, clip(ρ)A)| = |A|·max(ρ, low) for A < 0 grows with low; the gradient of what lies below it vanishes.
    *tokens, probs = random_tokens(seed)
    lows = (0.3, 0.6, 0.8, 1.0)
    surrogate = [share_at(low, 1.2, *tokens, rollout_probs=probs) for low in lows]
    assert surrogate == sorted(surrogate, reverse=True)
    gradient = [share_at(low, 1.2, *tokens, rollout_probs=probs, contribution="gradient") for low in lows]
    assert gradient == sorted(gradient)


@few
@given(seed=st.integers(0, 10_000), target=st.floats(0.05, 0.9))
def test_a_share_is_a_ratio_over_its_complement(seed: int, target: float):
    tokens = random_tokens(seed)
    by_share = search(*tokens, target=target)
    by_ratio = search(*tokens, target=target / (1 - target), criterion="ratio")
    assert (by_share.low, by_share.high, by_share.is_met) == (by_ratio.low, by_ratio.high, by_ratio.is_met)


@few
@given(seed=st.integers(0, 10_000))
def test_order_of_tokens_does_not_matter(seed: int):
    tokens = random_tokens(seed)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    here, there = search(*tokens, target=0.5), search(*(values[shuffle] for values in tokens), target=0.5)
    assert (here.low, here.high) == (there.low, there.high)
    assert here.share == pytest.approx(there.share, rel=1e-12)


def test_sums_are_taken_in_double_precision():
    # 2²⁴ + 1 is no fp32 number: summed in fp32, the second positive token would be lost.
    ratios, advantages = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0**24, 1.0, -1.0])
    share = share_at(0.6, 1.2, ratios, advantages, rollout_probs=None, criterion="ratio")
    assert share == 2.0**24 + 1


def test_targets_out_of_reach_end_at_the_widest_bounds():
    bounds = search(low_range=(0.8, 0.8), high_range=(1.2, 1.2), target=1.0)
    assert (bounds.low, bounds.high, bounds.is_met) == (0.8, 1.2, False)
    # A ratio may exceed 1.
    assert not search(target=1.5, criterion="ratio").is_met


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "advantages", "probs", "message"),
    [
        ((2, 3), (2, 3), None, r"kept tokens as one row \[N\], got ratios of shape \[2, 3\]"),
        ((3,), (2,), None, r"ratios \[3\], advantages \[2\]"),
        ((3,), (3,), (1,), r"ratios \[3\], rollout_probs \[1\]"),
    ],
)
def test_other_shapes_are_refused(ratios, advantages, probs, message: str):
    with pytest.raises(ValueError, match=message):
        search(torch.ones(ratios), torch.ones(advantages), None if probs is None else torch.ones(probs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_range": (0.9, 0.6)}, r"low_range must rise within \[0, 1\], got \(0.9, 0.6\)"),
        ({"low_range": (-0.1, 0.6)}, r"low_range must rise within \[0, 1\]"),
        ({"low_range": (0.6, 1.1)}, r"low_range must rise within \[0, 1\]"),
        ({"high_range": (3.0, 1.2)}, r"high_range must rise from 1 or more and be finite, got \(3.0, 1.2\)"),
        ({"high_range": (0.9, 1.2)}, r"high_range must rise from 1 or more"),
        ({"high_range": (1.2, INF)}, r"high_range must rise from 1 or more"),
        ({"low_step": 0.0}, r"low_step and high_step must be > 0, got 0.0 and 0.05"),
        ({"high_step": -0.1}, r"low_step and high_step must be > 0, got 0.02 and -0.1"),
        ({"high_step": NAN}, r"low_step and high_step must be > 0"),
        ({"target": -0.1}, r"target must be ≥ 0 and finite, and at most 1 as a share, got -0.1 as a share"),
        ({"target": 1.1}, r"at most 1 as a share, got 1.1 as a share"),
        ({"target": INF, "criterion": "ratio"}, r"target must be ≥ 0 and finite.*got inf as a ratio"),
    ],
)
def test_impossible_searches_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        search(**changes)
