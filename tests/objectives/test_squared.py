"""Least squares on log-ratios: the minimisers on policies small enough to enumerate, gradients, V* in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import lambertw
from support.builders import assert_close, f64, few, gradient
from torch import Tensor

from dar.objectives.squared import optimal_value, squared_error, uniform_optimal_value

ANCHOR = f64(0.2, 0.5, 0.3)
REWARDS = f64(1.0, 0.0, -1.0)
ONE_TOKEN = torch.ones(3, 1, dtype=torch.bool)


def population_loss(logits: Tensor, sampler: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """E_{y~sampler} of the library's loss, for the policy softmax(logits)."""
    logprobs = torch.log_softmax(logits, 0).unsqueeze(1)
    errors = squared_error(logprobs, ANCHOR.log().unsqueeze(1), advantages, ONE_TOKEN, beta=beta)
    return (sampler * errors).sum()


def minimised(sampler: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """The policy of the least loss."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits, sampler, advantages, beta=beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(logits.detach(), 0)


# --- the loss and its gradient ---------------------------------------------------------------------------------------


def test_by_hand():
    # β = ½. Log-ratios .3 − .7 = −.4 and .5: (1 + .2)²/1 = 1.44 and (−2 − .25)² = 5.0625.
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = f64([-0.7, -1.7], [-1.5, 9.0]).requires_grad_()
    losses = squared_error(logprobs, f64([-1.0, -1.0], [-2.0, math.nan]), f64(1.0, -2.0), mask, beta=0.5)
    assert_close(losses, [1.44, 5.0625], rtol=1e-14)
    # −(A − β · log-ratio) on every token.
    assert_close(gradient(losses, logprobs), f64([-1.2, -1.2], [2.25, 0.0]), rtol=1e-14)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 7.0])
def test_at_the_anchor_the_gradient_is_that_of_the_policy_gradient_whatever_beta_is(beta: float):
    anchor = f64([-1.0, -0.5], [-2.0, -3.0])
    logprobs = anchor.clone().requires_grad_()
    losses = squared_error(logprobs, anchor, f64(0.7, -2.0), torch.ones(2, 2, dtype=torch.bool), beta=beta)
    assert_close(gradient(losses, logprobs), f64([-0.7, -0.7], [2.0, 2.0]), rtol=1e-14)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta: float):
    tokens, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="beta must be > 0"):
        squared_error(tokens, tokens, torch.zeros(2), mask, beta=beta)
    with pytest.raises(ValueError, match="beta must be > 0"):
        optimal_value(torch.zeros(3), beta=beta)
    with pytest.raises(ValueError, match="beta must be > 0"):
        uniform_optimal_value(beta)


def test_shapes_must_agree():
    tokens, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="shapes must agree"):
        squared_error(tokens, tokens[:, :2], torch.zeros(2), mask, beta=1.0)
    with pytest.raises(ValueError, match="shapes must agree"):
        squared_error(tokens, tokens, torch.zeros(2, 3), mask, beta=1.0)


# --- minimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [ANCHOR, f64(0.6, 0.1, 0.3)], ids=["anchor", "other"])
def test_with_the_optimal_value_the_least_loss_is_0_at_the_tilted_policy_whoever_samples(sampler: Tensor):
    # V* = β log Σ π_a e^(r/β): A*-PO's and QRPO's regression, and PMD's with the true log Z.
    beta = 0.5
    value = beta * (ANCHOR.log() + REWARDS / beta).logsumexp(0)
    tilted = torch.softmax(ANCHOR.log() + REWARDS / beta, 0)
    assert_close(population_loss(tilted.log(), sampler, REWARDS - value, beta=beta), 0.0, rtol=0, atol=1e-28)
    assert_close(minimised(sampler, REWARDS - value, beta=beta), tilted, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_with_the_mean_reward_the_minimiser_has_lamberts_w_for_an_exponential(beta: float):
    # Stationarity of E_t[(Δ − β log ρ)²] under Σ π_t ρ = 1 is Δ − β log ρ = λρ, so ρ = W(c e^(Δ/β))/c with λ = βc.
    advantages = REWARDS - (ANCHOR * REWARDS).sum()

    def ratios(c: float) -> Tensor:
        return torch.from_numpy(lambertw(c * (advantages / beta).exp().numpy()).real) / c

    log_c: Any = brentq(lambda log_c: float((ANCHOR * ratios(math.exp(log_c))).sum()) - 1, -20, 20, xtol=1e-14)
    c = math.exp(log_c)
    found = minimised(ANCHOR, advantages, beta=beta)
    assert_close(found, ANCHOR * ratios(c), rtol=1e-5)
    # E_t of the stationarity: −β E_t[log ρ] = λ, as E_t Δ = 0. The weight of the χ² is β KL[π_t‖π].
    assert_close((ANCHOR * (ANCHOR / found).log()).sum(), c, rtol=1e-4)
    # Nearer to π_t than the mirror step with the true log Z.
    tilted = torch.softmax(ANCHOR.log() + REWARDS / beta, 0)
    assert (found * (found / ANCHOR).log()).sum() < (tilted * (tilted / ANCHOR).log()).sum()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_minimiser_with_the_mean_reward_is_that_of_kl_and_chi_squared_together(beta: float):
    # max E_π[Δ] − β KL[π‖π_t] − (λ/2) χ²[π‖π_t] at λ = β KL[π_t‖π]: no other policy is better.
    advantages = REWARDS - (ANCHOR * REWARDS).sum()
    best = minimised(ANCHOR, advantages, beta=beta)
    weight = beta * (ANCHOR * (ANCHOR / best).log()).sum()

    def objective(policy: Tensor) -> Tensor:
        ratio = policy / ANCHOR
        return (policy * (advantages - beta * ratio.log())).sum() - weight / 2 * (ANCHOR * (ratio - 1).square()).sum()

    others = torch.softmax(best.log() + 0.1 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), 1)
    assert all(objective(other) < objective(best) for other in others)


# --- V* --------------------------------------------------------------------------------------------------------------


def test_optimal_value_by_hand():
    # ½ log((3 + e²)/4) = 0.4772293.
    assert_close(optimal_value(f64([0, 0, 0, 1], [2, 2, 2, 2]), beta=0.5), [0.4772293, 2.0], rtol=1e-6)
    # e^1000 alone would overflow: 1 − .001 log 4.
    assert_close(optimal_value(f64(0, 0, 0, 1), beta=1e-3), 1 - 1e-3 * math.log(4), rtol=1e-12)


@few
@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 5))
def test_optimal_value_lies_between_mean_and_best_and_moves_with_the_rewards(seed: int, beta: float):
    rewards = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    value = optimal_value(rewards, beta=beta)
    assert rewards.mean() < value < rewards.max()
    assert_close(optimal_value(rewards + 3, beta=beta), value + 3, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7, 4.0])
def test_optimal_value_of_a_uniform_reward(beta: float):
    # 1 is taken off before the exponential.
    integral, _ = quad(lambda q: math.exp((q - 1) / beta), 0, 1)
    assert uniform_optimal_value(beta) == pytest.approx(1 + beta * math.log(integral), rel=1e-9)
    midpoints = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert_close(optimal_value(midpoints, beta=beta), uniform_optimal_value(beta), rtol=1e-7)


def test_optimal_value_of_a_uniform_reward_is_the_authors_but_for_what_they_leave_away():
    # β (log β + 1/β), as the README of CLAIRE-Labo/quantile-reward-policy-optimization has it.
    for beta, apart in ((1e-3, 0.0), (0.1, 4.54e-6), (1.0, 0.4587)):
        assert beta * math.log(beta) + 1 - uniform_optimal_value(beta) == pytest.approx(apart, rel=1e-3, abs=1e-15)
