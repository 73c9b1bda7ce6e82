"""LCO: the closed form of the optimum, convexity in the logits, and the on-policy form against the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, f64, few, gradient
from torch import Tensor

from dar.objectives.logits import lco_kld, lco_kld_on_policy, lco_logcosh, lco_mse, lco_target

NAN, INF = math.nan, math.inf


# p = softmax(1, 0, −1) = (.66524096, .24472847, .09003057).
GOLDEN_LOGITS = f64([1.0, 0.0, -1.0])
ONE = torch.ones(1, 1, dtype=torch.bool)


def random_positions(seed: int, rows: int = 4, vocabulary: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [M, V], advantages [M], actions [M])."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)
    advantages = 2 * torch.randn(rows, dtype=torch.float64, generator=generator)
    return logits, advantages, torch.randint(vocabulary, (rows,), generator=generator)


def taken(values: Tensor, actions: Tensor) -> Tensor:
    """[M, 1] the value of the sampled token: M completions of one token."""
    return values.gather(1, actions.unsqueeze(1))


# --- LCO-KLD over the vocabulary -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "advantage", "beta", "target", "divergence"),
    [
        # D = 1 − .66524096 + .66524096 e = 2.14307145; (1.80831241, .24472847, .09003057)/D.
        (0, 1.0, 1.0, [0.84379473, 0.11419520, 0.04201007], 0.08155468),
        # p_a e^−1 = .24472847: logits (0, 0, −1).
        (0, -1.0, 1.0, [0.42231880, 0.42231880, 0.15536240], 0.12329236),
        # logits (1, 0, −.5).
        (2, 1.0, 2.0, [0.62853172, 0.23122390, 0.14024438], 0.01335937),
    ],
)
def test_golden_target_divergence_and_gradient(
    action: int, advantage: float, beta: float, target: list[float], divergence: float
):
    logits = GOLDEN_LOGITS.clone().requires_grad_()
    actions, advantages = torch.tensor([action]), f64(advantage)
    assert_close(lco_target(GOLDEN_LOGITS, advantages, actions, beta=beta).exp(), [target], rtol=0, atol=6e-9)
    losses = lco_kld(logits, GOLDEN_LOGITS, advantages, actions, beta=beta)
    assert_close(losses, [divergence], rtol=0, atol=6e-9)
    expected = f64([0.66524096, 0.24472847, 0.09003057]) - f64(target)
    assert_close(gradient(losses, logits), expected, rtol=0, atol=1.2e-8)
    # The same from one log-probability.
    logprobs = torch.log_softmax(logits, 1)[:, action : action + 1]
    losses = lco_kld_on_policy(logprobs, advantages, ONE, beta=beta)
    assert_close(losses, [[divergence]], rtol=0, atol=6e-9)
    assert_close(gradient(losses, logits), expected, rtol=0, atol=1.2e-8)


@few
@given(seed=st.integers(0, 10_000), beta=st.floats(0.1, 5))
def test_target_is_the_closed_form(seed: int, beta: float):
    # π*(a) = p_a e^{A/β}/D, π*(v) = p_v/D, D = 1 − p_a + p_a e^{A/β}.
    logits, advantages, actions = random_positions(seed)
    p, ratio = torch.softmax(logits, 1), (advantages / beta).exp().unsqueeze(1)
    is_action = torch.nn.functional.one_hot(actions, 7).bool()
    p_action = taken(p, actions)
    expected = torch.where(is_action, p * ratio, p) / (1 - p_action + p_action * ratio)
    found = lco_target(logits.requires_grad_(), advantages, actions, beta=beta)
    assert_close(found.exp(), expected, rtol=1e-11)
    assert not found.requires_grad


@few
@given(seed=st.integers(0, 10_000))
def test_kld_is_the_divergence_and_its_gradient_the_difference_of_the_policies(seed: int):
    old, advantages, actions = random_positions(seed)
    logits = random_positions(seed + 1)[0].requires_grad_()
    target = lco_target(old, advantages, actions, beta=0.7)
    losses = lco_kld(logits, old, advantages, actions, beta=0.7)
    policy = torch.softmax(logits, 1)
    assert_close(losses, (target.exp() * (target.exp() / policy).log()).sum(1), rtol=1e-10)
    grad = gradient(losses, logits)
    assert_close(grad, policy - target.exp(), rtol=1e-10, atol=1e-14)
    assert (grad.norm(dim=1) < math.sqrt(2)).all()


def test_kld_does_not_see_a_shift_of_the_logits_and_keeps_rows_apart():
    logits, advantages, actions = random_positions(0)
    old = random_positions(1)[0]
    losses = lco_kld(logits, old, advantages, actions, beta=1.0)
    assert_close(lco_kld(logits + 3.0, old - 5.0, advantages, actions, beta=1.0), losses, rtol=1e-11)
    flipped = lco_kld(logits.flip(0), old.flip(0), advantages.flip(0), actions.flip(0), beta=1.0)
    assert_close(flipped, losses.flip(0), rtol=0)


def test_without_an_advantage_there_is_nothing_to_do():
    logits, _, actions = random_positions(3)
    leaf, nothing = logits.clone().requires_grad_(), torch.zeros(4, dtype=torch.float64)
    losses = lco_kld(leaf, logits, nothing, actions, beta=0.5)
    assert_close(losses, [0.0] * 4, rtol=0)
    assert_close(gradient(losses, leaf), torch.zeros_like(logits), rtol=0, atol=1e-15)
    action_logits, mask = taken(leaf, actions), torch.ones(4, 1, dtype=torch.bool)
    logprobs = taken(torch.log_softmax(leaf, 1), actions)
    for losses in (
        lco_kld_on_policy(logprobs, nothing, mask, beta=0.5),
        lco_mse(action_logits, action_logits, nothing, mask, beta=0.5),
        lco_logcosh(action_logits, action_logits, nothing, mask, beta=0.5),
    ):
        assert_close(losses, [[0.0]] * 4, rtol=0)
        assert_close(gradient(losses, leaf), torch.zeros_like(logits), rtol=0)


def test_for_small_advantages_kld_is_the_policy_gradient_times_the_probability():
    # −(A/β) p_a (e_a − p), up to a relative A/β.
    logits, advantages, actions = random_positions(4)
    leaf = logits.clone().requires_grad_()
    p = torch.softmax(logits, 1)
    score = torch.nn.functional.one_hot(actions, 7) - p
    expected = -(1e-6 * advantages / 0.5).unsqueeze(1) * taken(p, actions) * score
    grad = gradient(lco_kld(leaf, logits, 1e-6 * advantages, actions, beta=0.5), leaf)
    assert_close(grad, expected, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("advantage", [-1e3, 1e3])
def test_kld_of_extreme_advantages_is_finite(advantage: float):
    logits = torch.tensor([[1.0, 0.0, -1.0], [60.0, 0.0, 0.0]], requires_grad=True)
    actions, advantages = torch.tensor([0, 0]), torch.tensor([advantage] * 2)
    losses = lco_kld(logits, logits.detach(), advantages, actions, beta=1.0)
    # A target of e_a is −log p_a away, a target without a is −log(1 − p_a) away; log(1 + 2 e^−60) is 0 in fp32.
    expected = [-math.log(0.66524096), 0.0] if advantage > 0 else [-math.log(1 - 0.66524096), 60 - math.log(2)]
    assert_close(losses, expected, rtol=2e-7, atol=1e-7)
    assert gradient(losses, logits).isfinite().all()


def test_kld_in_half_precision_is_computed_in_single():
    logits, advantages, actions = random_positions(5)
    half, old = logits.bfloat16(), random_positions(6)[0].bfloat16()
    losses = lco_kld(half, old, advantages.float(), actions, beta=0.5)
    assert losses.dtype == torch.float32
    assert_close(
        losses, lco_kld(half.double(), old.double(), advantages.float().double(), actions, beta=0.5), rtol=1e-5
    )
    logprobs = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    short = lco_kld_on_policy(logprobs, torch.tensor([1.0], dtype=torch.bfloat16), ONE, beta=1.0)
    assert short.dtype == torch.float32
    assert_close(short, lco_kld_on_policy(f64([-1.0]), f64(1.0), ONE, beta=1.0), rtol=1e-6)
    # Logits of another precision than the advantages are no error.
    assert lco_target(half, advantages, actions, beta=0.5).dtype == torch.float32


# --- convexity, and what it is good for ------------------------------------------------------------------------------


def along(start: Tensor, direction: Tensor) -> Tensor:
    """[101, V] points of a line, evenly spaced."""
    return start + torch.linspace(-10, 10, 101, dtype=torch.float64).unsqueeze(1) * direction


@few
@given(seed=st.integers(0, 10_000))
def test_losses_are_convex_along_every_line_of_logits(seed: int):
    (start, direction, old), advantages, actions = random_positions(seed, rows=3)[0], f64(1.5), torch.tensor([2])
    points = along(start, direction)
    count = len(points)
    divergences = lco_kld(points, old.expand(count, -1), advantages.expand(count), actions.expand(count), beta=0.5)
    mask = torch.ones(1, count, dtype=torch.bool)
    of_actions, old_of_actions = points[:, 2].unsqueeze(0), old[2].expand(1, count)
    for losses in (
        divergences,
        lco_mse(of_actions, old_of_actions, advantages, mask, beta=0.5)[0],
        lco_logcosh(of_actions, old_of_actions, advantages, mask, beta=0.5)[0],
    ):
        assert losses.diff(n=2).min() > -1e-11
        assert losses.diff(n=2).max() > 0


@pytest.mark.parametrize(("loss", "step"), [("kld", 1.0), ("kld", 3.9), ("mse", 0.1), ("mse", 0.95)])
def test_large_steps_on_a_softmax_bandit_go_down_all_the_way(loss: str, step: float):
    # Gradient descent decreases a convex function if step < 2/L. KLD's Hessian diag(π) − ππᵀ has eigenvalues ≤ ½, so
    # step < 4; MSE's is 2, so step < 1. The target stays where π_t put it.
    old, advantages, actions = f64([2.0, 0.0, -1.0, 0.5]), f64(3.0), torch.tensor([2])
    logits, values = old.clone(), []
    for _ in range(400):
        leaf = logits.requires_grad_()
        if loss == "kld":
            losses = lco_kld(leaf, old, advantages, actions, beta=0.5)
        else:
            losses = lco_mse(taken(leaf, actions), taken(old, actions), advantages, ONE, beta=0.5)
        values.append(losses.item())
        logits = (leaf - step * gradient(losses, leaf)).detach()
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(values))
    assert values[0] > 0.5
    assert values[-1] < 1e-5


# --- LCO-KLD from the log-probability of the sampled token -----------------------------------------------------------


@few
@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 5))
def test_on_policy_value_and_gradient_are_those_of_the_whole_vocabulary(seed: int, beta: float):
    logits, advantages, actions = random_positions(seed)
    leaf = logits.clone().requires_grad_()
    full = lco_kld(leaf, logits, advantages, actions, beta=beta)
    short = lco_kld_on_policy(
        taken(leaf.log_softmax(1), actions), advantages, torch.ones(4, 1, dtype=torch.bool), beta=beta
    )
    # A/β of 100 is held to 1.4e−14, which is the absolute error of a small divergence.
    assert_close(short.squeeze(1), full, rtol=1e-10, atol=1e-13)
    assert_close(gradient(short, leaf), gradient(full, leaf), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("ratio", [-700.0, -30.0, -1.0, -1e-3, 1e-3, 1.0, 30.0, 700.0])
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.8, 0.999])
def test_on_policy_closed_form(p: float, ratio: float):
    # D = 1 − p + p e^x; value p e^x/D · x − log D, gradient −c = −p (e^x − 1)/D. A/β → ∞ makes π* = e_a: KL = −log p,
    # c = 1. A/β → −∞ takes a away: KL = −log(1 − p), c = −p/(1 − p).
    logprobs = f64([math.log(p)]).requires_grad_()
    losses = lco_kld_on_policy(logprobs, f64(0.5 * ratio), ONE, beta=0.5)
    denominator = 1 + p * math.expm1(ratio)
    value = p * math.exp(ratio) / denominator * ratio - math.log1p(p * math.expm1(ratio))
    assert_close(losses, [[value]], rtol=1e-9, atol=1e-15)
    assert_close(gradient(losses, logprobs), [[-p * math.expm1(ratio) / denominator]], rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [-1e3, -90.0, 90.0, 1e3])
@pytest.mark.parametrize("logprob", [0.0, -1e-30, -1e-6, -1.0, -80.0, -1e3, -2e3])
def test_on_policy_is_finite_at_the_extremes(logprob: float, ratio: float, dtype: torch.dtype):
    logprobs = torch.tensor([[logprob]], dtype=dtype, requires_grad=True)
    losses = lco_kld_on_policy(logprobs, torch.tensor([ratio], dtype=dtype), ONE, beta=1.0)
    grad = gradient(losses, logprobs)
    assert losses.isfinite().all()
    assert losses >= -1e-9
    # −1 < −c ≤ 1/(1 − p), and 1 − p is at least the epsilon of the dtype.
    assert -1 <= grad <= 1.001 / torch.finfo(dtype).eps
    assert grad <= 0 if ratio > 0 else grad >= 0


@pytest.mark.parametrize("ratio", [-1e3, -20.0, 20.0, 1e3])
def test_gradient_in_the_logits_is_bounded_where_the_probability_rounds_to_one(ratio: float):
    # In fp32 log_softmax gives exactly 0 for the first token, with e^−25 = 1.4e−11 left for each of the others.
    logits = torch.tensor([[25.0, 0.0, 0.0]], requires_grad=True)
    logprobs = logits.log_softmax(1)[:, :1]
    assert logprobs.item() == 0.0
    grad = gradient(lco_kld_on_policy(logprobs, torch.tensor([ratio]), ONE, beta=1.0), logits)
    assert grad.isfinite().all()
    assert grad.norm() < math.sqrt(2)


def test_on_policy_keeps_small_losses():
    # p (1 − p) x²/2 to second order, c = p x to first. In fp32 π*(a) x − log D would be the rounding of p, times x.
    p = torch.tensor([[0.1, 0.3, 0.6, 0.9]], dtype=torch.float64)
    logprobs = p.log().float().requires_grad_()
    losses = lco_kld_on_policy(logprobs, torch.tensor([1e-5]), torch.ones(1, 4, dtype=torch.bool), beta=1.0)
    assert_close(losses, p * (1 - p) * 1e-10 / 2, rtol=1e-4)
    assert_close(gradient(losses, logprobs), -1e-5 * p, rtol=1e-4)
    assert losses.dtype == torch.float32


# --- LCO-MSE and log cosh --------------------------------------------------------------------------------------------

LogitLoss = Callable[..., Tensor]


def logcosh(x: float) -> float:
    return math.log(math.cosh(x))


@pytest.mark.parametrize("loss", [lco_mse, lco_logcosh])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_golden_residual(loss: LogitLoss, sign: float):
    # z_θ − z_t − A/β = 2 − 1 − 1/2 = .5, and its opposite.
    logits = f64([2.0 * sign]).requires_grad_()
    losses = loss(logits, f64([1.0 * sign]), f64(1.0 * sign), ONE, beta=2.0)
    value, slope = (0.25, 1.0) if loss is lco_mse else (0.12011451, 0.46211716)
    assert_close(losses, [[value]], rtol=0, atol=6e-9)
    assert_close(gradient(losses, logits), [[sign * slope]], rtol=0, atol=6e-9)


@few
@given(seed=st.integers(0, 10_000), beta=st.floats(0.1, 5))
def test_value_and_gradient_of_a_batch(seed: int, beta: float):
    generator = torch.Generator().manual_seed(seed)
    logits, old = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    advantages = torch.randn(3, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 4, generator=generator) < 0.7
    logits.requires_grad_()
    # A small residual is the difference of numbers up to 30, hence the absolute tolerance.
    residual = (logits.detach() - old - advantages.unsqueeze(1) / beta) * mask
    losses = lco_mse(logits, old, advantages, mask, beta=beta)
    assert_close(losses, residual**2, rtol=1e-12, atol=1e-13)
    assert_close(gradient(losses, logits), 2 * residual, rtol=1e-12, atol=1e-13)
    losses = lco_logcosh(logits, old, advantages, mask, beta=beta)
    assert_close(losses, residual.cosh().log(), rtol=1e-12, atol=1e-13)
    assert_close(gradient(losses, logits), residual.tanh(), rtol=1e-12, atol=1e-13)


def test_with_the_current_logits_as_old_ones_the_squared_loss_is_that_of_the_authors_code():
    # The residual is then −A/β whatever the logits, the gradient −2A/β.
    logits = f64([0.3, -7.0]).requires_grad_()
    losses = lco_mse(logits, logits, f64(1.5), torch.ones(1, 2, dtype=torch.bool), beta=0.5)
    assert_close(losses, [[9.0, 9.0]], rtol=1e-12)
    assert_close(gradient(losses, logits), [[-6.0, -6.0]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_cosh_of_large_residuals_is_finite(dtype: torch.dtype):
    logits = torch.tensor([[1e4, -1e4, 100.0]], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(1, 3, dtype=dtype)
    losses = lco_logcosh(logits, zeros, zeros[:, 0], torch.ones(1, 3, dtype=torch.bool), beta=1.0)
    assert_close(losses, [[1e4 - math.log(2), 1e4 - math.log(2), 100 - math.log(2)]], rtol=1e-6)
    assert_close(gradient(losses, logits), [[1.0, -1.0, 1.0]], rtol=0)


@pytest.mark.parametrize("loss", [lco_mse, lco_logcosh])
def test_half_precision_logits_are_subtracted_in_single(loss: LogitLoss):
    # 16.0625 + 1/16 − 16 takes more bits than the eight of bf16.
    half = [torch.tensor([[x]], dtype=torch.bfloat16) for x in (17.0, 16.0)]
    advantages = torch.tensor([0.0625], dtype=torch.bfloat16)
    losses = loss(*half, advantages, ONE, beta=1.0)
    assert losses.dtype == torch.float32
    assert_close(losses, [[0.9375**2 if loss is lco_mse else logcosh(0.9375)]], rtol=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN])
def test_beta_must_be_positive(beta: float):
    logits, advantages, actions = random_positions(0)
    tokens, mask = taken(logits, actions), torch.ones(4, 1, dtype=torch.bool)
    calls: list[Callable[[], Tensor]] = [
        lambda: lco_target(logits, advantages, actions, beta=beta),
        lambda: lco_kld(logits, logits, advantages, actions, beta=beta),
        lambda: lco_kld_on_policy(tokens, advantages, mask, beta=beta),
        lambda: lco_mse(tokens, tokens, advantages, mask, beta=beta),
        lambda: lco_logcosh(tokens, tokens, advantages, mask, beta=beta),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"beta must be > 0, got {beta}"):
            call()
