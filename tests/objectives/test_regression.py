"""Regression weights and the weighted log-likelihood, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few, golden_scored, padded, random_rewards, random_rows

from dar.advantages import batch_standardized, group_mean
from dar.objectives.regression import (
    best_of_n_weights,
    clip_log_weights,
    dar_log_weights,
    is_clipped,
    var_weights,
    weighted_nll,
)

NAN, INF = math.nan, math.inf
# The golden batch: LP_0 − LP_t = (−2, 1, 0, −5), A = (−1, 1, −.25, .25), σ = √.53125 = .72886899.
SIGMA = math.sqrt(0.53125)
LOG_W_REG = [-0.2, 0.1, 0.0, -0.5]
ADVANTAGES = [-1.3719886811400708, 1.3719886811400708, -0.3429971702850177, 0.3429971702850177]


def golden_log_weights(*, alpha: float = 0.1, beta: float) -> torch.Tensor:
    batch = golden_scored()
    assert batch.ref_logprobs is not None
    advantages = batch_standardized(group_mean(batch.rewards)).flatten()
    return dar_log_weights(batch.old_logprobs, batch.ref_logprobs, advantages, batch.mask, alpha=alpha, beta=beta)


# --- DAR's weights ---------------------------------------------------------------------------------------------------


def test_log_weights_of_the_golden_batch():
    # α·(LP_0 − LP_t) + Â/β, with Â/.05 = (∓27.43977362, ∓6.85994341) and Â/1 = (∓1.37198868, ∓.34299717).
    assert_close(golden_log_weights(beta=0.05), [-27.63977362, 27.53977362, -6.85994341, 6.35994341], rtol=1e-6)
    assert_close(golden_log_weights(beta=1.0), [-1.57198868, 1.47198868, -0.34299717, -0.15700283], rtol=1e-6)


def test_clipped_weights_of_the_golden_batch():
    # e^−27.6398 = 9.9129e-13 and e^−6.8599 = 1.04897e-3; the other two exceed 20. fp32 holds a log weight of 28 to
    # 2e-6, hence the tolerance.
    narrow = clip_log_weights(golden_log_weights(beta=0.05), 20.0)
    assert_close(narrow, [9.91285684809873e-13, 20.0, 1.0489732968570185e-3, 20.0], rtol=3e-6)
    wide = clip_log_weights(golden_log_weights(beta=1.0), 20.0)
    assert_close(wide, [0.20763185794803, 4.35789298895754, 0.70964021963693, 0.85470164025223], rtol=1e-6)


def test_weights_are_a_gate_around_a_threshold():
    # w = w_clip · min(1, exp((Â − τ)/β)), τ = β ln w_clip + αβ (LP_t − LP_0).
    beta = 0.5
    drift = torch.tensor([2.0, -1.0, 0.0, 5.0], dtype=torch.float64)
    threshold = beta * math.log(2.0) + 0.1 * beta * drift
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    gate = 2.0 * ((advantages - threshold) / beta).exp().clamp(max=1.0)
    assert_close(clip_log_weights(golden_log_weights(beta=beta), 2.0), gate, rtol=1e-6)


def test_alpha_zero_does_not_read_the_reference():
    batch = golden_scored()
    nowhere = torch.full_like(batch.old_logprobs, NAN)
    advantages = torch.tensor(ADVANTAGES)
    weights = dar_log_weights(batch.old_logprobs, nowhere, advantages, batch.mask, alpha=0.0, beta=0.05)
    assert_close(weights, advantages / 0.05, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_reference_equal_to_the_behaviour_policy_leaves_only_the_advantage(alpha: float):
    old = golden_scored().old_logprobs
    advantages = torch.tensor(ADVANTAGES)
    weights = dar_log_weights(old, old, advantages, golden_scored().mask, alpha=alpha, beta=2.0)
    assert_close(weights, advantages / 2.0, rtol=0)


def test_alpha_weighs_the_drift_of_the_whole_sequence():
    # A sum over tokens and not a mean: with the mean, α would shrink with length.
    zeros = torch.zeros(4)
    batch = golden_scored()
    assert batch.ref_logprobs is not None
    weights = dar_log_weights(batch.old_logprobs, batch.ref_logprobs, zeros, batch.mask, alpha=1.0, beta=0.05)
    assert_close(weights, [-2.0, 1.0, 0.0, -5.0], rtol=0)
    assert_close(0.1 * weights, LOG_W_REG, rtol=1e-6)


def test_log_weights_sum_in_fp32_whatever_they_are_given():
    # 300 tokens of 1 + 2⁻⁷ nats: the sum is 302.34375, of which bf16 keeps 302 at best.
    old = torch.full((1, 300), -1.0078125, dtype=torch.bfloat16)
    mask = torch.ones(1, 300, dtype=torch.bool)
    weights = dar_log_weights(
        old, torch.zeros_like(old), torch.zeros(1, dtype=torch.bfloat16), mask, alpha=1.0, beta=1.0
    )
    assert weights.dtype == torch.float32
    assert_close(weights, [302.34375], rtol=0)


def test_weights_carry_no_gradient():
    scores = torch.tensor([[1.0, 2.0]], requires_grad=True)
    for weights in (clip_log_weights(scores, 20.0), var_weights(scores, temperature=1.0), best_of_n_weights(scores)):
        assert not weights.requires_grad


@pytest.mark.parametrize("advantage", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("gap", [-1e4, 0.0, 1e4])
def test_extreme_inputs_give_finite_weights_within_bounds(advantage: float, gap: float):
    # A/β = ±2e4 against a drift of ±1e4 nats: exp of either alone is 0 or ∞ in any precision.
    log_weights = dar_log_weights(
        torch.tensor([[-1.0]]),
        torch.tensor([[-1.0 + gap]]),
        torch.tensor([advantage]),
        torch.tensor([[True]]),
        alpha=1.0,
        beta=0.05,
    )
    assert_close(log_weights, [gap + advantage / 0.05], rtol=1e-6)
    weight = clip_log_weights(log_weights, 20.0)
    expected = 1.0 if advantage == gap == 0 else 20.0 if log_weights.item() > 0 else 0.0
    assert_close(weight, [expected], rtol=1e-6)
    assert 0.0 <= weight.item() <= 20.0


def test_the_product_is_clipped_and_not_its_factors():
    # log w_reg = −5 and log w_adv = 6: the product is e, although w_adv = 403 alone exceeds 20.
    log_weights = dar_log_weights(
        torch.tensor([[-1.0]]), torch.tensor([[-6.0]]), torch.tensor([6.0]), torch.tensor([[True]]), alpha=1.0, beta=1.0
    )
    assert_close(clip_log_weights(log_weights, 20.0), [math.e], rtol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (-0.1, 0.05, r"alpha is a share and must lie in \[0, 1\], got -0.1"),
        (1.1, 0.05, r"alpha is a share and must lie in \[0, 1\], got 1.1"),
        (NAN, 0.05, r"alpha is a share and must lie in \[0, 1\], got nan"),
        (0.1, 0.0, r"beta must be > 0, got 0.0"),
        (0.1, -1.0, r"beta must be > 0, got -1.0"),
        (0.1, NAN, r"beta must be > 0, got nan"),
    ],
)
def test_impossible_regularisation_is_refused(alpha: float, beta: float, message: str):
    with pytest.raises(ValueError, match=message):
        golden_log_weights(alpha=alpha, beta=beta)


# --- clipping --------------------------------------------------------------------------------------------------------


def test_clipping_bounds_above_only():
    log_weights = torch.tensor([-INF, -1e30, 0.0, math.log(19.0), math.log(21.0), 1e30, INF])
    assert_close(clip_log_weights(log_weights, 20.0), [0.0, 0.0, 1.0, 19.0, 20.0, 20.0, 20.0], rtol=1e-6)


def test_infinite_w_clip_turns_clipping_off():
    log_weights = torch.tensor([-3.0, 10.0])
    assert_close(clip_log_weights(log_weights, INF), [math.exp(-3.0), math.exp(10.0)], rtol=1e-6)
    assert not is_clipped(log_weights, INF).any()


def test_clipped_rows_are_told_by_the_logarithm():
    # In float64 exp(log 20) = 19.999999999999996, so `w >= 20` would say that nothing was clipped.
    assert math.exp(math.log(20.0)) < 20.0
    log_weights = torch.tensor([2.0, math.log(20.0), 100.0], dtype=torch.float64)
    assert is_clipped(log_weights, 20.0).tolist() == [False, True, True]
    assert is_clipped(log_weights.float(), 20.0).tolist() == [False, True, True]


@pytest.mark.parametrize("w_clip", [0.5, 20.0, 30.0, 1000.0])
def test_weights_never_exceed_w_clip(w_clip: float):
    assert (clip_log_weights(torch.full((9,), 1e5), w_clip).double() <= w_clip).all()


@pytest.mark.parametrize("w_clip", [0.0, -1.0, NAN])
def test_w_clip_must_be_positive(w_clip: float):
    with pytest.raises(ValueError, match="w_clip must be > 0"):
        clip_log_weights(torch.zeros(1), w_clip)


# --- VAR and best of N -----------------------------------------------------------------------------------------------


def test_var_weights_at_known_rewards():
    # softmax(0, 1, 2) = (.09003057, .24472847, .66524096), times K = 3.
    weights = var_weights(torch.tensor([[0.0, 1.0, 2.0]]), temperature=1.0)
    assert_close(weights, [[0.2700917194, 0.7341854130, 1.9957228676]], rtol=1e-6)
    # A temperature divides: (0, 2, 4)/2 is the same.
    assert_close(var_weights(torch.tensor([[0.0, 2.0, 4.0]]), temperature=2.0), weights, rtol=0)


@few
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.1, 10))
def test_var_weights_average_to_one_and_ignore_a_shift(seed: int, temperature: float):
    rewards = torch.tensor(random_rewards(seed, 3, 4))
    weights = var_weights(rewards, temperature=temperature)
    assert_close(weights.mean(1), [1.0, 1.0, 1.0], rtol=1e-6)
    assert_close(var_weights(rewards + 8.0, temperature=temperature), weights, rtol=2e-5, atol=1e-6)


def test_var_weights_reach_their_limits():
    rewards = torch.tensor([[0.0, 1.0, -1.0]])
    assert_close(var_weights(rewards, temperature=1e9), [[1.0, 1.0, 1.0]], rtol=1e-6)
    assert_close(var_weights(rewards, temperature=1e-3), 3 * best_of_n_weights(rewards), rtol=1e-6)
    assert_close(var_weights(1e30 * rewards, temperature=1.0), [[0.0, 3.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_var_refuses_a_temperature_that_is_not_positive(temperature: float):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        var_weights(torch.zeros(1, 2), temperature=temperature)


def test_best_of_n_takes_the_first_of_equals():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [0.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    assert best_of_n_weights(rewards).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert best_of_n_weights(rewards.double()).dtype == torch.float32


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "loss"),
    [
        # (20·11 + 1.0489733e-3·8 + 20·15)/4 = 130.00209795, at θ = θ_t.
        (0.05, 130.00209794659617),
        # (.20763186·10 + 4.35789299·11 + .70964022·8 + .85470164·15)/4 = 17.12769695.
        (1.0, 17.127696954723024),
    ],
)
def test_loss_of_the_golden_batch(beta: float, loss: float):
    batch = golden_scored()
    weights = clip_log_weights(golden_log_weights(beta=beta), 20.0)
    assert_close(weighted_nll(batch.old_logprobs, weights, batch.mask).mean(), loss, rtol=1e-6)


@few
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 5))
def test_gradient_is_minus_the_weight_on_every_token_and_nothing_else(seed: int, num_rows: int):
    current, _, _ = random_rows(seed, num_rows)
    mask = padded([[1.0] * len(row) for row in current]).bool()
    logprobs = padded(current, padding=NAN, dtype=torch.float64).requires_grad_()
    weights = torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    losses = weighted_nll(logprobs, weights, mask)
    expected = torch.tensor([-weight * sum(row) for weight, row in zip(weights.tolist(), current, strict=True)])
    assert_close(losses, expected, rtol=1e-5)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, -weights.detach().unsqueeze(1) * mask, rtol=0)
    assert weights.grad is None
