"""Rewards per token, whitening and the critic's loss: values by hand, gradients, padding, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, f64, few, padded, random_rows
from torch import Tensor

from dar.objectives.actor_critic import clipped_value_loss, token_rewards, whitened

INF, NAN = math.inf, math.nan
# A row of three tokens and one of a single token.
MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, NAN, NAN]], dtype=torch.float64)
REF = torch.tensor([[-3.0, -1.0, -5.0], [-1.5, NAN, INF]], dtype=torch.float64)
REWARDS = torch.tensor([1.0, -2.0], dtype=torch.float64)


# --- rewards per token -----------------------------------------------------------------------------------------------


def test_rewards_of_two_completions():
    # log π_t − log π₀ = (2, −1, 2) and (1), times −.05; the reward stands on each row's own last token.
    rewards = token_rewards(REWARDS, OLD, REF, MASK, kl_coef=0.05)
    assert_close(rewards, [[-0.1, 0.05, 0.9], [-2.05, 0.0, 0.0]], rtol=1e-12)


def test_no_penalty_does_not_read_the_reference():
    expected = [[0.0, 0.0, 1.0], [-2.0, 0.0, 0.0]]
    assert_close(token_rewards(REWARDS, OLD, None, MASK, kl_coef=0.0), expected, rtol=0)
    nowhere = torch.full_like(OLD, NAN)
    assert_close(token_rewards(REWARDS, OLD, nowhere, MASK, kl_coef=0.0), expected, rtol=0)


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 5), extra=st.integers(0, 3))
def test_row_sums_to_the_reward_less_its_kl(seed: int, num_rows: int, extra: int):
    _, old, ref = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in old], extra=extra).bool()
    rewards = torch.randn(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    per_token = token_rewards(
        rewards,
        padded(old, padding=NAN, extra=extra, dtype=torch.float64),
        padded(ref, padding=NAN, extra=extra, dtype=torch.float64),
        mask,
        kl_coef=0.3,
    )
    drift = torch.tensor([sum(row) - sum(other) for row, other in zip(old, ref, strict=True)], dtype=torch.float64)
    assert_close(per_token.sum(1), rewards - 0.3 * drift, rtol=1e-12, atol=1e-13)
    assert (per_token[~mask] == 0).all()


def test_reward_of_a_broken_row_stays_in_its_last_token():
    rewards = token_rewards(torch.tensor([NAN, 1.0]), OLD, None, MASK, kl_coef=0.0)
    assert rewards.isnan().tolist() == [[False, False, True], [False, False, False]]


@pytest.mark.parametrize("kl_coef", [-0.1, INF, NAN])
def test_kl_coef_must_be_a_weight(kl_coef: float):
    with pytest.raises(ValueError, match="kl_coef must be ≥ 0 and finite"):
        token_rewards(REWARDS, OLD, REF, MASK, kl_coef=kl_coef)


def test_penalty_without_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"kl_coef = 0.05 penalises distance from π₀ and needs ref_logprobs, got None"):
        token_rewards(REWARDS, OLD, None, MASK, kl_coef=0.05)


# --- whitening -------------------------------------------------------------------------------------------------------


def test_whitened_values():
    # (1, 2, 3, 6) has mean 3 and, with three degrees of freedom, variance (4 + 1 + 0 + 9)/3 = 14/3.
    result = whitened(f64([1, 2, 3], [6, NAN, INF]), MASK)
    scale = math.sqrt(14 / 3)
    assert_close(result, [[-2 / scale, -1 / scale, 0], [3 / scale, 0, 0]], rtol=1e-8)


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(2, 5), scale=st.floats(0.1, 100), shift=st.floats(-10, 10))
def test_whitened_tokens_have_mean_zero_and_deviation_one(seed: int, num_rows: int, scale: float, shift: float):
    rows, _, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in rows]).bool()
    advantages = padded(rows, padding=NAN, dtype=torch.float64)
    result = whitened(scale * advantages + shift, mask)
    assert_close(result[mask].mean(), 0.0, rtol=0, atol=1e-9)
    assert_close(result[mask].std(correction=1), 1.0, rtol=1e-6)
    assert (result[~mask] == 0).all()
    assert_close(result, whitened(advantages, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_equal_advantages_whiten_to_zero(value: float):
    assert_close(whitened(torch.full((2, 3), value), MASK), torch.zeros(2, 3), rtol=0)


def test_too_few_tokens_whiten_to_zero():
    one = torch.tensor([[True, False]])
    assert_close(whitened(torch.tensor([[5.0, NAN]]), one), [[0.0, 0.0]], rtol=0)
    assert_close(whitened(torch.tensor([[NAN, NAN]]), torch.zeros_like(one)), [[0.0, 0.0]], rtol=0)


def test_whitening_leaves_its_argument_and_carries_no_gradient():
    advantages = f64([1, 2, 3], [6, 0, 0]).requires_grad_()
    assert not whitened(advantages, MASK).requires_grad
    assert_close(advantages, [[1, 2, 3], [6, 0, 0]], rtol=0)


# --- the critic ------------------------------------------------------------------------------------------------------


def row_losses(values: Tensor, old: list[float], returns: list[float], *, clip_value: float) -> Tensor:
    mask = torch.ones_like(values, dtype=torch.bool)
    return clipped_value_loss(values, f64(old), f64(returns), mask, clip_value=clip_value)


def test_value_loss_and_where_its_gradient_vanishes():
    # V_old = 1, ε = .2. In turn: inside, (1.1 − 2)²; up towards G = 2, bounded at 1.2, .8² > .5²; down away from G, V
    # itself is the farther; down towards G = 0, bounded at .8 > .5; up away from G; across G = 1.3 and farther than the
    # bound, (1.6 − 1.3)² > (1.2 − 1.3)².
    values = f64([1.1, 1.5, 0.5, 0.5, 1.5, 1.6]).requires_grad_()
    losses = row_losses(values, [1.0] * 6, [2.0, 2.0, 2.0, 0.0, 0.0, 1.3], clip_value=0.2)
    assert_close(losses, [[0.405, 0.32, 1.125, 0.32, 1.125, 0.045]], rtol=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), values)
    assert_close(grad, [[-0.9, 0.0, -1.5, 0.0, 1.5, 0.3]], rtol=1e-12)


def test_infinite_clip_is_half_the_squared_error():
    values = f64([1.1, 1.5, -70.0]).requires_grad_()
    losses = row_losses(values, [1.0] * 3, [2.0, 2.0, 0.0], clip_value=INF)
    assert_close(losses, [[0.405, 0.125, 2450.0]], rtol=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), values)
    assert_close(grad, [[-0.9, -0.5, -70.0]], rtol=1e-12)


@pytest.mark.parametrize("clip_value", [0.0, -0.2, NAN])
def test_clip_value_must_be_positive(clip_value: float):
    with pytest.raises(ValueError, match="clip_value must be > 0"):
        row_losses(f64([1.0]), [1.0], [1.0], clip_value=clip_value)
