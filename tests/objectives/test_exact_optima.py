"""The closed forms on a policy small enough to enumerate: no sampling, every outcome is one token.

π₀ = (.5, .3, .2), π_t = (.2, .5, .3), A = (1, 0, −1), α = .4, β = .5, unless a test says otherwise. Library weights are
fp32, hence tolerances of a few 1e-7.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, few
from torch import Tensor

from dar.algorithms.policy_gradient import RLOO
from dar.batch import Batch, TokenGroups, TokenOutputs
from dar.config.policy_gradient import RLOOSpec
from dar.objectives.regression import clip_log_weights, dar_log_weights, weighted_nll
from dar.ops import kl_k1

PI_0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PI_T = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
ALPHA, BETA = 0.4, 0.5
# π₀^α π_t^(1−α) e^(A/β), normalised: (2.13203811, .40759656, .03452199) / 2.57415665.
PI_STAR = [0.82824723, 0.15834178, 0.01341099]


def weights_of(
    pi_0: Tensor,
    pi_t: Tensor,
    advantages: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    w_clip: float = math.inf,
) -> Tensor:
    mask = torch.ones(len(pi_t), 1, dtype=torch.bool)
    log_weights = dar_log_weights(
        pi_t.log().unsqueeze(1), pi_0.log().unsqueeze(1), advantages, mask, alpha=alpha, beta=beta
    )
    return clip_log_weights(log_weights, w_clip).double()


def regressed(pi_t: Tensor, weights: Tensor) -> Tensor:
    """∝ π_t·w, the maximiser of E_{y~π_t}[w log π(y)] over all distributions (Gibbs' inequality)."""
    return pi_t * weights / (pi_t * weights).sum()


def population_loss(logits: Tensor, pi_t: Tensor, weights: Tensor) -> Tensor:
    """E_{y~π_t} of the library's loss, for the policy softmax(logits)."""
    mask = torch.ones(len(pi_t), 1, dtype=torch.bool)
    losses = weighted_nll(torch.log_softmax(logits, 0).unsqueeze(1), weights, mask)
    return (pi_t * losses).sum()


def gradient_at(policy: Tensor, pi_t: Tensor, weights: Tensor) -> Tensor:
    logits = policy.log().requires_grad_()
    (grad,) = torch.autograd.grad(population_loss(logits, pi_t, weights), logits)
    return grad


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * kl_k1(p.log(), q.log())).sum()


def objective(policy: Tensor, pi_0: Tensor, pi_t: Tensor, advantages: Tensor, *, alpha: float, beta: float) -> Tensor:
    """E_π[A] − β (α KL[π‖π₀] + (1−α) KL[π‖π_t])."""
    return (policy * advantages).sum() - beta * (alpha * kl(policy, pi_0) + (1 - alpha) * kl(policy, pi_t))


def random_policies(seed: int, count: int, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.softmax(torch.randn(count, size, dtype=torch.float64, generator=generator), 1))


# --- one KL term for two: Prop. 4.1 ----------------------------------------------------------------------------------


def test_mean_regularisation_weight_is_the_normaliser():
    # C = Σ π₀^.4 π_t^.6 = .28854 + .40760 + .25508 = E_{π_t}[w_reg], and π_ref = π_t·w_reg/C.
    w_reg = weights_of(PI_0, PI_T, torch.zeros(3))
    assert_close((PI_T * w_reg).sum(), 0.95122144, rtol=2e-7)
    assert_close(-(PI_T * w_reg).sum().log(), 0.05000840, rtol=4e-6)
    assert_close(regressed(PI_T, w_reg), [0.30333629, 0.42849808, 0.26816563], rtol=2e-7)


@few
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1))
def test_two_kls_are_one_kl_to_the_interpolated_reference_less_log_c(seed: int, alpha: float):
    # α log(π/π₀) + (1−α) log(π/π_t) = log(π/π_ref) − log C pointwise; take E_π. Plain equality would be wrong: the
    # constant −log C = (1−α)·(Rényi divergence of order α) is positive unless π₀ = π_t.
    policy, pi_0, pi_t = random_policies(seed, 3)
    w_reg = weights_of(pi_0, pi_t, torch.zeros(5), alpha=alpha)
    log_c = (pi_t * w_reg).sum().log()
    both = alpha * kl(policy, pi_0) + (1 - alpha) * kl(policy, pi_t)
    assert_close(both, kl(policy, regressed(pi_t, w_reg)) - log_c, rtol=1e-6, atol=1e-6)
    # At α = 1 the true log C is 0. A weight e^x in fp32 is off by |x| roundings of its logarithm and two of its own.
    assert log_c <= (alpha * (pi_0 / pi_t).log().abs().max() + 2) * torch.finfo(torch.float32).eps


# --- the optimum: Thm 4.2 --------------------------------------------------------------------------------------------


def test_weights_of_the_golden_policies():
    # (.5/.2)^.4 e² = 10.66019, (.3/.5)^.4 = .81519, (.2/.3)^.4 e^−2 = .11507; E_t[w] = Z.
    weights = weights_of(PI_0, PI_T, ADVANTAGES)
    assert_close(weights, [10.66019054, 0.81519311, 0.11507329], rtol=4e-7)
    assert_close((PI_T * weights).sum(), 2.57415665, rtol=4e-7)


def test_optimum_of_the_golden_policies():
    # log Z = log 2.57415665 = .94552197, and J(π*) = β log Z.
    weights = weights_of(PI_0, PI_T, ADVANTAGES)
    best = regressed(PI_T, weights)
    assert_close(best, PI_STAR, rtol=5e-7)
    assert_close((PI_T * weights).sum().log(), 0.94552197, rtol=4e-7)
    assert_close(objective(best, PI_0, PI_T, ADVANTAGES, alpha=ALPHA, beta=BETA), 0.47276098, rtol=4e-7)


@few
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1), beta=st.floats(0.2, 3))
def test_no_policy_beats_the_weights_optimum_and_the_gap_is_its_kl(seed: int, alpha: float, beta: float):
    # J(π) = β log Z − β KL[π‖π*].
    policy, pi_0, pi_t, shape = random_policies(seed, 4)
    advantages = shape.log()
    weights = weights_of(pi_0, pi_t, advantages, alpha=alpha, beta=beta)
    best, z = regressed(pi_t, weights), (pi_t * weights).sum()
    value = objective(policy, pi_0, pi_t, advantages, alpha=alpha, beta=beta)
    assert_close(value, beta * z.log() - beta * kl(policy, best), rtol=1e-5, atol=1e-5)
    assert objective(best, pi_0, pi_t, advantages, alpha=alpha, beta=beta) >= value - 1e-6


def test_loss_is_stationary_at_the_optimum_only():
    # ∇ = E_t[w]·π − π_t·w vanishes at π*; the loss is convex in the logits, so that is its minimum.
    weights = weights_of(PI_0, PI_T, ADVANTAGES)
    assert_close(gradient_at(regressed(PI_T, weights), PI_T, weights), torch.zeros(3), rtol=0, atol=1e-12)
    # At π_t: 2.57415665·π_t − π_t·w.
    assert_close(gradient_at(PI_T, PI_T, weights), [-1.61720678, 0.87948177, 0.73772501], rtol=1e-6)


def test_minimising_the_loss_reaches_the_optimum():
    weights = weights_of(PI_0, PI_T, ADVANTAGES)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits, PI_T, weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(torch.softmax(logits, 0), PI_STAR, rtol=1e-6)


def test_constant_added_to_a_prompts_advantages_scales_its_weights():
    # Z takes it up: the same optimum, e^(b/β) times the weight. A baseline therefore matters once weights are clipped.
    weights = weights_of(PI_0, PI_T, ADVANTAGES)
    moved = weights_of(PI_0, PI_T, ADVANTAGES + 0.3)
    assert_close(moved / weights, [math.exp(0.3 / BETA)] * 3, rtol=1e-6)
    assert_close(regressed(PI_T, moved), regressed(PI_T, weights), rtol=1e-6)


def test_clipped_optimum_is_the_clipped_weights_times_the_behaviour_policy():
    # w_clip = 5: π_t·min(w, 5) = (1, .40759656, .03452199), of sum 1.44211855.
    weights = weights_of(PI_0, PI_T, ADVANTAGES, w_clip=5.0)
    clipped = regressed(PI_T, weights)
    assert_close(clipped, [0.69342427, 0.28263735, 0.02393838], rtol=1e-6)
    assert_close(gradient_at(clipped, PI_T, weights), torch.zeros(3), rtol=0, atol=1e-12)


@few
@given(seed=st.integers(0, 10_000), w_clip=st.floats(0.5, 50))
def test_clipping_bounds_the_step(seed: int, w_clip: float):
    # π_clip/π_t = min(w, w_clip)/E_t[min(w, w_clip)] ≤ w_clip/E_t[…], so KL[π_clip‖π_t] ≤ log of that.
    pi_0, pi_t, shape = random_policies(seed, 3)
    weights = weights_of(pi_0, pi_t, 3 * shape.log(), w_clip=w_clip)
    bound = math.log(w_clip / (pi_t * weights).sum().item())
    assert kl(regressed(pi_t, weights), pi_t).item() <= bound + 1e-6


# --- iterated exact steps --------------------------------------------------------------------------------------------


def exact_step(pi_t: Tensor, rewards: Tensor, *, alpha: float, pi_0: Tensor = PI_0) -> Tensor:
    """π_{t+1} = π* of the advantages r − E_{π_t}[r]."""
    return regressed(pi_t, weights_of(pi_0, pi_t, rewards - (pi_t * rewards).sum(), alpha=alpha))


def stationary(rewards: Tensor, *, alpha: float, pi_0: Tensor = PI_0) -> Tensor:
    """∝ π₀ e^(r/(αβ)), the optimum of KL-regularised RLHF with coefficient αβ."""
    return torch.softmax(pi_0.log() + rewards / (alpha * BETA), 0)


def test_fixed_point_is_the_kl_regularised_optimum_with_coefficient_alpha_beta():
    # (.5 e⁵, .3, .2 e^−5), normalised.
    limit = stationary(ADVANTAGES, alpha=ALPHA)
    assert_close(limit, [0.9959555, 0.00402642, 0.00001809], rtol=0, atol=5e-8)
    assert_close(limit, torch.tensor([0.5 * math.exp(5), 0.3, 0.2 * math.exp(-5)]) / 74.50792711, rtol=1e-6)
    assert_close(exact_step(limit, ADVANTAGES, alpha=ALPHA), limit, rtol=2e-6)


@pytest.mark.parametrize("start", [PI_T, torch.tensor([0.01, 0.01, 0.98], dtype=torch.float64)])
@pytest.mark.parametrize("alpha", [0.3, 0.4, 1.0])
def test_steps_contract_by_one_minus_alpha_towards_the_fixed_point(start: Tensor, alpha: float):
    # log π_{t+1} = α log π₀ + (1−α) log π_t + r/β + const: distances in log space, up to the constant, shrink by 1−α.
    limit = stationary(ADVANTAGES, alpha=alpha)

    def distance(policy: Tensor) -> Tensor:
        gap = policy.log() - limit.log()
        return gap - gap.mean()

    policy = start
    for _ in range(4):
        following = exact_step(policy, ADVANTAGES, alpha=alpha)
        assert_close(distance(following), (1 - alpha) * distance(policy), rtol=0, atol=3e-6)
        policy = following


def test_alpha_zero_adds_up_rewards_without_end():
    # log π_T = log π₀ + T·r/β + const: nothing pulls back.
    policy = PI_0
    for _ in range(3):
        policy = exact_step(policy, ADVANTAGES, alpha=0.0)
    assert_close(policy, torch.softmax(PI_0.log() + 3 * ADVANTAGES / BETA, 0), rtol=2e-6)


@few
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1))
def test_steps_never_lower_reward_less_kl_to_the_initial_policy(seed: int, alpha: float):
    # π = π_t is a candidate of the objective, and its KL to π_t vanishes.
    pi_0, pi_t, shape = random_policies(seed, 3)
    rewards = shape.log()
    following = exact_step(pi_t, rewards, alpha=alpha, pi_0=pi_0)

    def value(policy: Tensor) -> float:
        return ((policy * rewards).sum() - alpha * BETA * kl(policy, pi_0)).item()

    assert value(following) >= value(pi_t) - 1e-6


def test_constant_reward_without_reference_moves_nothing():
    # w ≡ 1: plain fine-tuning on one's own samples, whose expected gradient at θ_t is 0.
    weights = weights_of(PI_0, PI_T, torch.zeros(3), alpha=0.0)
    assert_close(weights, [1.0, 1.0, 1.0], rtol=0)
    assert_close(gradient_at(PI_T, PI_T, weights), torch.zeros(3), rtol=0, atol=1e-15)


def test_length_of_a_completion_does_not_move_the_fixed_point():
    # Three completions of 1, 2 and 4 tokens with w = 1. Dividing each row's loss by its length would move the optimum
    # from π_t = (.5, .3, .2) to ∝ π_t/|y| = (.714, .214, .071).
    pi_t = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    lengths = torch.tensor([1, 2, 4])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    logits = pi_t.log().requires_grad_()
    per_token = (torch.log_softmax(logits, 0) / lengths).unsqueeze(1).expand(3, 4)
    (pi_t * weighted_nll(per_token, torch.ones(3, dtype=torch.float64), mask)).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, torch.zeros(3), rtol=0, atol=1e-15)


# --- links to the policy gradient ------------------------------------------------------------------------------------


def test_first_order_of_dar_is_the_policy_gradient_with_kl_coefficient_alpha_beta():
    # w = 1 + z + z²/2 + … with z = A/β − α·D, D = log π_t/π₀: β·∇L → −E[(A − αβ·D)∇log π] (the 1 has no gradient), and
    # what is left out is O(1/β). With αβ = .05 fixed, doubling β halves the error.
    drift = PI_T.log() - PI_0.log()
    signal = ADVANTAGES - 0.05 * drift
    # −E[s ∇log π] in logits is −π_t·(s − E s).
    expected = -PI_T * (signal - (PI_T * signal).sum())

    def relative_error(beta: float) -> float:
        grad = beta * gradient_at(PI_T, PI_T, weights_of(PI_0, PI_T, ADVANTAGES, alpha=0.05 / beta, beta=beta))
        return ((grad - expected).norm() / expected.norm()).item()

    assert relative_error(50.0) < 0.01
    assert relative_error(50.0) / relative_error(100.0) == pytest.approx(2.0, rel=0.02)


def pairs_scored(policy: Tensor, pi_0: Tensor, rewards: Tensor) -> tuple[Batch, Tensor]:
    """Every pair of outcomes as a group of K = 2 one-token completions, and its outcomes as [B] indices."""
    size = len(policy)
    outcomes = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    rows = outcomes.reshape(-1)
    groups = TokenGroups(
        prompt_ids=((0,),) * len(outcomes),
        group_sizes=(2,) * len(outcomes),
        completion_ids=rows.unsqueeze(1),
        mask=torch.ones(len(rows), 1, dtype=torch.bool),
    )
    scored = Batch(
        groups=groups,
        old_logprobs=policy.log()[rows].unsqueeze(1),
        ref_logprobs=pi_0.log()[rows].unsqueeze(1),
        rewards=rewards[outcomes],
        has_eos=torch.ones(len(rows), dtype=torch.bool),
    )
    return scored, rows


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.7])
def test_rloo_gradient_is_unbiased(beta: float):
    # Over all 9 pairs with their probabilities, the expected gradient is that of −(E[r] − β KL[π‖π₀]).
    logits = PI_T.log().requires_grad_()
    policy = torch.softmax(logits, 0)
    exact = -((policy * ADVANTAGES).sum() - beta * (policy * (policy.log() - PI_0.log())).sum())
    (expected,) = torch.autograd.grad(exact, logits)

    algorithm = RLOO(RLOOSpec(beta=beta))
    scored, rows = pairs_scored(PI_T, PI_0, ADVANTAGES)
    weighted, _ = algorithm.weigh(scored)
    log_policy = torch.log_softmax(logits, 0)
    losses = algorithm.terms(TokenOutputs(log_policy[rows].unsqueeze(1)), weighted).losses.reshape(-1, 2)
    probability = PI_T[rows].reshape(-1, 2).prod(1)
    (grad,) = torch.autograd.grad((probability * losses.mean(1)).sum(), logits)
    assert_close(grad, expected, rtol=1e-12, atol=1e-15)
