"""The clipped surrogate at token and at sequence level: values, gradients, and where the gradient vanishes."""

from __future__ import annotations

import math

import pytest
import torch
from builders import assert_close, few, padded, random_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dar.objectives.ratio import clipped_surrogate, clipped_tokens, sequence_clipped_surrogate

NAN, INF = math.nan, math.inf
EPS = {"clip_low": 0.2, "clip_high": 0.2}
# ρ = π_θ/π_t = (1.25, .8, 1.25, .8).
GOLDEN_LOGPROBS = torch.tensor([[0.5, 0.2, 0.1, 0.4]], dtype=torch.float64).log()
GOLDEN_OLD = torch.tensor([[0.4, 0.25, 0.08, 0.5]], dtype=torch.float64).log()
GOLDEN_ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
ONE_ROW = torch.ones(1, 4, dtype=torch.bool)


def tokens(ratios: list[float], advantages: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row per ratio: log π_θ (with gradient), log π_t, advantage, mask."""
    old = torch.full((len(ratios), 1), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log().unsqueeze(1)).requires_grad_()
    return logprobs, old, torch.tensor(advantages, dtype=torch.float64), torch.ones(len(ratios), 1, dtype=torch.bool)


def gradient(losses: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return grad


def test_surrogate_of_the_golden_tokens():
    # −min(1.25, 1.2), −min(.8, .8), −min(−1.25, −1.2), −min(−.8, −.8); their mean is .05/4.
    losses = clipped_surrogate(GOLDEN_LOGPROBS, GOLDEN_OLD, GOLDEN_ADVANTAGES, ONE_ROW, **EPS)
    assert_close(losses, [[-1.2, -0.8, 1.25, 0.8]], rtol=1e-12)
    assert_close(losses.mean(), 0.0125, rtol=1e-12)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_gradient_vanishes_exactly_where_moving_on_would_be_rewarded(surrogate):
    # d/dlogπ of −ρA is −ρA; it is cut where A > 0 and ρ > 1 + ε, or A < 0 and ρ < 1 − ε.
    ratios = [1.3, 0.7, 1.1, 1.3, 0.7, 0.9]
    advantages = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    logprobs, old, rows, mask = tokens(ratios, advantages)
    losses = surrogate(logprobs, old, rows, mask, **EPS)
    assert_close(losses.flatten(), [-2.4, -1.4, -2.2, 2.6, 1.6, 1.8], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), [0.0, -1.4, -2.2, 2.6, 0.0, 1.8], rtol=1e-12)
    clipped = clipped_tokens(logprobs - old, rows.unsqueeze(1), **EPS)
    assert clipped.flatten().tolist() == [True, False, False, False, True, False]


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_bounds_may_differ(surrogate):
    # ε_low = .1, ε_high = .28: 1.25 and .95 lie inside, 1.3 and .85 outside.
    logprobs, old, rows, mask = tokens([1.25, 1.3, 0.95, 0.85], [1.0, 1.0, -1.0, -1.0])
    losses = surrogate(logprobs, old, rows, mask, clip_low=0.1, clip_high=0.28)
    assert_close(losses.flatten(), [-1.25, -1.28, 0.95, 0.9], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), [-1.25, 0.0, 0.95, 0.0], rtol=1e-12)
    clipped = clipped_tokens(logprobs - old, rows.unsqueeze(1), clip_low=0.1, clip_high=0.28)
    assert clipped.flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_infinite_upper_bound_and_unit_lower_bound_never_clip(surrogate):
    ratios, advantages = [50.0, 0.01, 50.0, 0.01], [1.0, 1.0, -1.0, -1.0]
    logprobs, old, rows, mask = tokens(ratios, advantages)
    losses = surrogate(logprobs, old, rows, mask, clip_low=1.0, clip_high=INF)
    assert_close(losses.flatten(), [-50.0, -0.01, 50.0, 0.01], rtol=1e-12)
    assert_close(gradient(losses, logprobs).flatten(), losses.flatten(), rtol=1e-12)
    assert not clipped_tokens(logprobs - old, rows.unsqueeze(1), clip_low=1.0, clip_high=INF).any()


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 5))
def test_at_the_behaviour_policy_the_gradient_is_the_policy_gradient(seed: int, num_rows: int):
    # ρ = 1 lies inside both bounds: the gradient is −A on every sampled token, at token and at sequence level.
    _, old, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    behaviour = padded(old, dtype=torch.float64)
    advantages = torch.randn(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = -advantages.unsqueeze(1) * mask
    for surrogate in (clipped_surrogate, sequence_clipped_surrogate):
        logprobs = behaviour.clone().requires_grad_()
        losses = surrogate(logprobs, behaviour, advantages, mask, **EPS)
        assert_close(gradient(losses, logprobs), expected, rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 4))
def test_clipped_tokens_are_those_without_gradient(seed: int, num_rows: int):
    current, old, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old]).bool()
    logprobs, behaviour = padded(current, dtype=torch.float64).requires_grad_(), padded(old, dtype=torch.float64)
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grad = gradient(clipped_surrogate(logprobs, behaviour, advantages, mask, **EPS), logprobs)
    assert torch.equal((grad == 0)[mask], clipped_tokens(logprobs - behaviour, advantages, **EPS)[mask])


def test_advantage_of_a_row_is_that_of_its_tokens():
    logprobs, old = GOLDEN_LOGPROBS.reshape(2, 2), GOLDEN_OLD.reshape(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    rows = torch.tensor([1.0, -1.0], dtype=torch.float64)
    shared = clipped_surrogate(logprobs, old, rows, mask, **EPS)
    assert_close(shared, [[-1.2, -0.8], [1.25, 0.8]], rtol=1e-12)
    spelt_out = clipped_surrogate(logprobs, old, GOLDEN_ADVANTAGES.reshape(2, 2), mask, **EPS)
    assert_close(shared, spelt_out, rtol=0)


def test_sequence_ratio_is_the_product_of_the_token_ratios():
    # Ratios 1.15 and 1.15 lie inside 1.2 each; their product 1.3225 does not. 1.5 and .7 are outside; 1.05 is inside.
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[1.15, 1.15], [1.5, 0.7]], dtype=torch.float64)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages, mask = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    losses = sequence_clipped_surrogate(logprobs, old, advantages, mask, **EPS)
    assert_close(losses, [-2.4, -2.1], rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[0.0, 0.0], [-2.1, -2.1]], rtol=1e-12)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e4])
def test_padding_is_not_read_and_gets_no_gradient(surrogate, garbage: float):
    # The second row is one token of ratio e^.1 with A = −1.
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]], dtype=torch.float64)
    logprobs = torch.tensor([[-1.0, -2.0], [-0.9, garbage]], dtype=torch.float64, requires_grad=True)
    losses = surrogate(logprobs, old, torch.tensor([1.0, -1.0], dtype=torch.float64), mask, **EPS)
    assert_close(losses[1].sum(), math.exp(0.1), rtol=1e-12)
    assert_close(gradient(losses, logprobs), [[-1.0, -1.0], [math.exp(0.1), 0.0]], rtol=1e-12)


def test_garbage_in_the_padding_of_the_behaviour_policy_and_of_advantages_is_not_read():
    mask = torch.tensor([[True, False]])
    logprobs = torch.tensor([[-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, NAN]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, NAN]], dtype=torch.float64)
    losses = clipped_surrogate(logprobs, old, advantages, mask, **EPS)
    assert_close(losses, [[-2.0, 0.0]], rtol=0)
    assert_close(gradient(losses, logprobs), [[-2.0, 0.0]], rtol=0)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
def test_only_the_trained_policy_gets_a_gradient(surrogate):
    logprobs, old, rows, mask = tokens([1.1, 0.9], [1.0, -1.0])
    old.requires_grad_()
    rows.requires_grad_()
    surrogate(logprobs, old, rows, mask, **EPS).sum().backward()
    assert logprobs.grad is not None
    assert old.grad is None
    assert rows.grad is None


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (0.0, 0.0)])
def test_ratio_beyond_the_float_range_is_clipped_like_any_other(surrogate, advantage: float, loss: float):
    logprobs = torch.tensor([[100.0]], requires_grad=True)
    zeros, mask = torch.zeros(1, 1), torch.tensor([[True]])
    losses = surrogate(logprobs, zeros, torch.tensor([advantage]), mask, **EPS)
    assert_close(losses.flatten(), [loss], rtol=1e-6)
    assert_close(gradient(losses, logprobs), [[0.0]], rtol=0)


@pytest.mark.parametrize("surrogate", [clipped_surrogate, sequence_clipped_surrogate])
@pytest.mark.parametrize(("clip_low", "clip_high"), [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (NAN, 0.2), (0.2, NAN)])
def test_impossible_bounds_are_refused(surrogate, clip_low: float, clip_high: float):
    with pytest.raises(ValueError, match=r"clip_low must lie in \[0, 1\] and clip_high be ≥ 0"):
        surrogate(*tokens([1.0], [1.0]), clip_low=clip_low, clip_high=clip_high)


@pytest.mark.parametrize(
    ("surrogate", "old", "advantages", "message"),
    [
        (clipped_surrogate, (2, 2), (2,), r"logprobs \[2, 3\], old_logprobs \[2, 2\], mask \[2, 3\]"),
        (clipped_surrogate, (2, 3), (3,), r"advantages \[3\], rows \[2\]"),
        (clipped_surrogate, (2, 3), (2, 1), r"advantages \[2, 1\], mask \[2, 3\]"),
        (sequence_clipped_surrogate, (2, 2), (2,), r"logprobs \[2, 3\], old_logprobs \[2, 2\], mask \[2, 3\]"),
        (sequence_clipped_surrogate, (2, 3), (3,), r"advantages \[3\], rows \[2\]"),
        (sequence_clipped_surrogate, (2, 3), (2, 3), r"advantages \[2, 3\], rows \[2\]"),
    ],
)
def test_other_shapes_are_refused(surrogate, old, advantages, message: str):
    with pytest.raises(ValueError, match=message):
        surrogate(
            torch.zeros(2, 3), torch.zeros(old), torch.zeros(advantages), torch.ones(2, 3, dtype=torch.bool), **EPS
        )
