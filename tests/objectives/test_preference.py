"""Preference losses: values and slopes by hand, and optima on a policy small enough to enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, f64, few
from torch import Tensor

from dar.objectives.preference import chi_po, dpo, ipo, log_ratio_margin, npo, slic

NAN, INF = math.nan, math.inf
PAIRWISE = [dpo, ipo, slic, partial(chi_po, max_reward=INF)]
NAMES = ["dpo", "ipo", "slic", "chi_po"]
each_loss = pytest.mark.parametrize("loss", PAIRWISE, ids=NAMES)


# LP_θ(w, l) = (−10, −9), LP_0(w, l) = (−12, −9.5): ℓ_w = 2, ℓ_l = .5, Δ = 1.5.
GOLDEN = (f64(-10.0), f64(-9.0), f64(-12.0), f64(-9.5))


def pairs(chosen_log_ratios: list[float], rejected_log_ratios: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs with the given ℓ = LP_θ − LP_0; the two of the policy are leaves."""
    ref_chosen = torch.full((len(chosen_log_ratios),), -8.0, dtype=torch.float64)
    ref_rejected = torch.full((len(rejected_log_ratios),), -4.0, dtype=torch.float64)
    chosen = (ref_chosen + f64(*chosen_log_ratios)).requires_grad_()
    rejected = (ref_rejected + f64(*rejected_log_ratios)).requires_grad_()
    return chosen, rejected, ref_chosen, ref_rejected


def slopes(losses: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """(dL/dLP_θ(y_w), dL/dLP_θ(y_l))."""
    up, down = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return up, down


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- values and slopes -----------------------------------------------------------------------------------------------


def test_margin_of_the_golden_pair():
    assert_close(log_ratio_margin(*GOLDEN), [1.5], rtol=0)


CHI_MARGIN = math.exp(2) + 2 - math.exp(0.5) - 0.5  # 7.24033483


@pytest.mark.parametrize(
    ("loss", "beta", "rounded", "exact"),
    [
        (dpo, 0.1, 0.62095705, math.log1p(math.exp(-0.15))),
        (ipo, 0.1, 12.25, (1.5 - 5) ** 2),
        (slic, 0.1, 0.85, 1 - 0.15),
        (slic, 0.8, 0.0, 0.0),  # 1 − 1.2 < 0
        (partial(chi_po, max_reward=INF), 0.1, 0.39527530, math.log1p(math.exp(-0.1 * CHI_MARGIN))),
        # .05 · 7.24 = .36201674 lies within ±2, .1 · 7.24 = .72403348 does not lie within ±.4.
        (partial(chi_po, max_reward=1.0), 0.05, 0.52843214, math.log1p(math.exp(-0.05 * CHI_MARGIN))),
        (partial(chi_po, max_reward=0.2), 0.1, 0.51301525, math.log1p(math.exp(-0.4))),
    ],
)
def test_loss_of_the_golden_pair(loss: Callable[..., Tensor], beta: float, rounded: float, exact: float):
    losses = loss(*GOLDEN, beta=beta)
    assert_close(losses, [rounded], rtol=0, atol=6e-9)
    assert_close(losses, [exact], rtol=1e-12)


MARGINS = [-3.0, -0.5, 0.0, 1.0, 4.0]
BETA = 0.5


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (dpo, lambda margin: -BETA * sigmoid(-BETA * margin)),
        (ipo, lambda margin: 2 * (margin - 1 / (2 * BETA))),  # 0 at Δ = 1
        (slic, lambda margin: -BETA if BETA * margin < 1 else 0.0),  # 0 at Δ = 4
    ],
    ids=NAMES[:3],
)
def test_slope_in_the_margin(loss: Callable[..., Tensor], slope: Callable[[float], float]):
    # Δ = (Δ + .7) − .7; the gradient is the slope at the chosen completion and its opposite at the rejected one.
    chosen, rejected, *reference = pairs([margin + 0.7 for margin in MARGINS], [0.7] * len(MARGINS))
    up, down = slopes(loss(chosen, rejected, *reference, beta=BETA), chosen, rejected)
    expected = f64(*map(slope, MARGINS))
    assert_close(up, expected, rtol=1e-12, atol=1e-14)
    assert_close(down, -expected, rtol=1e-12, atol=1e-14)


def test_hinge_has_no_gradient_on_its_corner():
    # β Δ = .5 · 2 = 1 exactly.
    chosen, rejected, *reference = pairs([2.0], [0.0])
    losses = slic(chosen, rejected, *reference, beta=0.5)
    assert losses.item() == 0.0
    assert [slope.item() for slope in slopes(losses, chosen, rejected)] == [0.0, 0.0]


def test_chi_po_slopes_differ_between_chosen_and_rejected():
    # dL/dLP_w = −β σ(−m) (1 + e^ℓ_w), dL/dLP_l = +β σ(−m) (1 + e^ℓ_l), m = β (h_w − h_l).
    above, below = f64(2.0, -1.0, 0.3), f64(0.5, 1.0, -2.0)
    chosen, rejected, *reference = pairs(above.tolist(), below.tolist())
    up, down = slopes(chi_po(chosen, rejected, *reference, beta=0.3, max_reward=INF), chosen, rejected)
    pull = 0.3 / (1 + (0.3 * (above.exp() + above - below.exp() - below)).exp())
    assert_close(up, -pull * (1 + above.exp()), rtol=1e-12)
    assert_close(down, pull * (1 + below.exp()), rtol=1e-12)


def test_chi_po_has_no_gradient_where_the_margin_is_clipped():
    # Margins .1·(7.24, −7.24, 1.27) against ±.4: the first two are clipped, from above and from below.
    chosen, rejected, *reference = pairs([2.0, 0.5, 0.5], [0.5, 2.0, 0.1])
    losses = chi_po(chosen, rejected, *reference, beta=0.1, max_reward=0.2)
    assert_close(losses[:2], [math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.4))], rtol=1e-12)
    up, down = slopes(losses, chosen, rejected)
    assert up[:2].tolist() == down[:2].tolist() == [0.0, 0.0]
    assert up[2] < 0 < down[2]


def test_chi_po_bounds_the_exponential_and_not_the_linear_term():
    # ℓ = 25 and 22: both exponentials are e^20 and cancel, the margin is β · 3 and its slope β, as in DPO.
    # ℓ = −100 and −90: both are e^−88 and cancel as well.
    chosen, rejected, *reference = pairs([25.0, -90.0], [22.0, -100.0])
    losses = chi_po(chosen, rejected, *reference, beta=0.1, max_reward=INF)
    assert_close(losses, dpo(chosen, rejected, *reference, beta=0.1), rtol=1e-12)
    up, down = slopes(losses, chosen, rejected)
    assert_close(up, [-0.1 * sigmoid(-0.3), -0.1 * sigmoid(-1.0)], rtol=1e-12)
    assert_close(down, -up, rtol=1e-12)
    # One beyond the bound alone: h_w − h_l = e^20 + 25 − 1, at β = 1e−8.
    chosen, rejected, *reference = pairs([25.0], [0.0])
    losses = chi_po(chosen, rejected, *reference, beta=1e-8, max_reward=INF)
    assert_close(losses, [-math.log(sigmoid(1e-8 * (math.exp(20) + 24)))], rtol=1e-12)


def test_chi_po_keeps_the_linear_term_in_single_precision():
    # fp32 has steps of 32 at e^20: h_w − h_l taken from two rounded h would be 0 and not 3.
    single = [tensor.detach().float() for tensor in pairs([25.0], [22.0])]
    assert_close(chi_po(*single, beta=0.1, max_reward=INF), [-math.log(sigmoid(0.3))], rtol=1e-6)


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_at_the_reference_dpo_is_log_two_with_slope_half_beta_and_chi_po_has_twice_that(beta: float):
    chosen, rejected, *reference = pairs([0.0], [0.0])
    losses = dpo(chosen, rejected, *reference, beta=beta)
    assert_close(losses, [math.log(2)], rtol=1e-15)
    up, down = slopes(losses, chosen, rejected)
    assert_close(up, [-beta / 2], rtol=1e-15)
    assert_close(down, [beta / 2], rtol=1e-15)
    losses = chi_po(chosen, rejected, *reference, beta=beta, max_reward=1.0)
    assert_close(losses, [math.log(2)], rtol=1e-15)
    twice_up, twice_down = slopes(losses, chosen, rejected)
    assert_close(twice_up, 2 * up, rtol=0)
    assert_close(twice_down, 2 * down, rtol=0)


def test_chi_po_without_its_exponential_is_dpo(monkeypatch: pytest.MonkeyPatch):
    chosen, rejected, *reference = pairs([2.0, -1.0], [0.5, 0.3])
    monkeypatch.setattr("dar.objectives.preference._bounded_exp", torch.zeros_like)
    ours = chi_po(chosen, rejected, *reference, beta=0.3, max_reward=INF)
    theirs = dpo(chosen, rejected, *reference, beta=0.3)
    assert_close(ours, theirs, rtol=0)
    for ours_slope, theirs_slope in zip(slopes(ours, chosen, rejected), slopes(theirs, chosen, rejected), strict=True):
        assert_close(ours_slope, theirs_slope, rtol=0)


@each_loss
@few
@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5))
def test_swapping_a_pair_flips_the_margin(loss, seed: int, shift: float):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    margin = log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    assert_close(log_ratio_margin(rejected, chosen, ref_rejected, ref_chosen), -margin, rtol=1e-12)
    # A completion that both policies find less likely by the same factor changes nothing; row order only the order.
    losses = loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    moved = loss(chosen + shift, rejected - shift, ref_chosen + shift, ref_rejected - shift, beta=0.3)
    assert_close(moved, losses, rtol=1e-11, atol=1e-13)
    flipped = loss(*(tensor.flip(0) for tensor in (chosen, rejected, ref_chosen, ref_rejected)), beta=0.3)
    assert_close(flipped, losses.flip(0), rtol=0)


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "at_minus", "at_plus"),
    [
        (dpo, 1e4, 0.0),
        (ipo, (1e4 + 0.5) ** 2, (1e4 - 0.5) ** 2),
        (slic, 1e4 + 1, 0.0),
        (partial(chi_po, max_reward=INF), math.exp(20) + 1e4 - 1, 0.0),  # h(1e4) − h(0)
        (partial(chi_po, max_reward=2.0), math.log1p(math.exp(4)), math.log1p(math.exp(-4))),
    ],
    ids=[*NAMES, "chi_po_clipped"],
)
def test_margins_of_ten_thousand_nats_are_finite(loss, at_minus: float, at_plus: float, dtype: torch.dtype):
    # ℓ_w = 0 and ℓ_l = 1e4, then ℓ_w = 1e4 and ℓ_l = 0.
    policy = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], dtype=dtype, requires_grad=True)
    reference = torch.full((2,), -1e4, dtype=dtype)
    losses = loss(policy[0], policy[1], reference, reference, beta=1.0)
    assert_close(losses, [at_minus, at_plus], rtol=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert grad.isfinite().all()


@each_loss
def test_half_precision_is_subtracted_in_single(loss):
    # 1000 and 992 are bf16 numbers, their margin against −3.015625 is 11.015625, which bf16 rounds to 11.
    half = [torch.tensor([x], dtype=torch.bfloat16) for x in (-992.0, -3.015625, -1000.0, 0.0)]
    losses = loss(*half, beta=0.01)
    assert losses.dtype == torch.float32
    assert_close(losses, loss(*(tensor.double() for tensor in half), beta=0.01), rtol=1e-5)
    assert_close(log_ratio_margin(*half), [11.015625], rtol=0)


# --- optima on an enumerable policy ----------------------------------------------------------------------------------

PI_0 = f64(0.4, 0.3, 0.2, 0.1)
REWARDS = f64(0.0, 0.5, 1.0, 2.0)
# Every ordered pair of four outcomes, drawn with the frequencies of some sampler that is neither policy.
WINNERS, LOSERS = (index.flatten() for index in (~torch.eye(4, dtype=torch.bool)).nonzero().split(1, dim=1))
SAMPLER = f64(0.1, 0.2, 0.3, 0.4)


def population_loss(loss: Callable[..., Tensor], logits: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The expected loss under Bradley–Terry preferences, P(i preferred to j) = σ(r_i − r_j)."""
    frequencies = SAMPLER[WINNERS] * SAMPLER[LOSERS] * torch.sigmoid(rewards[WINNERS] - rewards[LOSERS])
    policy, reference = torch.log_softmax(logits, 0), PI_0.log()
    losses = loss(policy[WINNERS], policy[LOSERS], reference[WINNERS], reference[LOSERS], beta=beta)
    return (frequencies * losses).sum()


def minimised(loss: Callable[..., Tensor], rewards: Tensor, beta: float) -> Tensor:
    """The policy that LBFGS reaches from π₀."""
    logits = PI_0.log().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = population_loss(loss, logits, rewards, beta)
        value.backward()
        return value

    optimiser.step(closure)
    return torch.softmax(logits.detach(), 0)


def inverse_link(values: Tensor) -> Tensor:
    """φ⁻¹: the z with z + log z = u, by Newton on log z; convex and increasing, so it converges from the right."""
    log_z = values.clamp(min=1.0).log().maximum(values.clamp(max=1.0))
    for _ in range(60):
        log_z = log_z - (log_z.exp() + log_z - values) / (log_z.exp() + 1)
    return log_z.exp()


def chi_squared_optimum(rewards: Tensor, beta: float) -> Tensor:
    """π₀ φ⁻¹((r − Z)/β), with Z found by bisection such that it sums to 1."""
    low, high = rewards.min() - 50 * beta - 50, rewards.max() + 50 * beta
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (PI_0 * inverse_link((rewards - middle) / beta)).sum() > 1
        low, high = (middle, high) if too_much else (low, middle)
    return PI_0 * inverse_link((rewards - low) / beta)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_dpo_on_bradley_terry_preferences_finds_the_kl_regularised_optimum(beta: float):
    expected = PI_0 * (REWARDS / beta).exp()
    assert_close(minimised(dpo, REWARDS, beta), expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_chi_po_on_bradley_terry_preferences_finds_its_own_optimum(beta: float):
    expected = chi_squared_optimum(REWARDS, beta)
    assert_close(expected.sum(), 1.0, rtol=1e-12)
    # R_max = 2 is the largest difference of rewards over two: a clip at ±2 R_max = ±4 does not touch the optimum.
    for max_reward in (2.0, INF):
        assert_close(minimised(partial(chi_po, max_reward=max_reward), REWARDS, beta), expected, rtol=1e-6)


def test_tail_of_chi_po_is_linear_in_the_reward_and_that_of_dpo_exponential():
    # A completion too rare for its mass to matter, against one that stays at π₀ (ℓ = 0): with r/β = 200 between them
    # DPO rests at ℓ = 200, a ratio of e^200, and χPO at φ(e^ℓ) = 200 + φ(1), a ratio of 200 less a logarithm.
    reward, beta = f64(2.0), 0.01
    ratio = inverse_link(reward / beta + 1)
    assert 195 < ratio < 196
    chi = partial(chi_po, max_reward=INF)
    for loss, log_ratio in ((dpo, reward / beta), (chi, ratio.log())):
        for step, sign in ((-1e-3, -1), (0.0, 0), (1e-3, 1)):
            chosen, rejected, *reference = pairs((log_ratio + step).tolist(), [0.0])
            liked = loss(chosen, rejected, *reference, beta=beta)
            disliked = loss(rejected, chosen, *reversed(reference), beta=beta)
            expected = torch.sigmoid(reward) * liked + torch.sigmoid(-reward) * disliked
            (grad,) = torch.autograd.grad(expected, chosen)
            assert grad.abs() < 1e-14 if sign == 0 else sign * grad > 1e-9


# --- NPO -------------------------------------------------------------------------------------------------------------


def test_golden_npo():
    # β h = .6: log(1 + e^.6) = 1.03748795, coefficient .3 σ(.6) = .19369689.
    logprobs = f64(-5.0).requires_grad_()
    losses = npo(logprobs, f64(-7.0), beta=0.3)
    assert_close(losses, [1.03748795], rtol=0, atol=6e-9)
    assert_close(losses, [math.log1p(math.exp(0.6))], rtol=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert_close(grad, [0.19369689], rtol=0, atol=6e-9)


def test_npo_gradient_pushes_down_and_fades_below_the_reference():
    log_ratios = [-20.0, -1.0, 0.0, 1.0, 20.0]
    reference = torch.full((5,), -30.0, dtype=torch.float64)
    logprobs = (reference + f64(*log_ratios)).requires_grad_()
    losses = npo(logprobs, reference, beta=0.5)
    assert_close(losses[2], math.log(2), rtol=1e-15)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert_close(grad, [0.5 * sigmoid(0.5 * h) for h in log_ratios], rtol=1e-12)
    assert_close(npo(torch.tensor([-1e4, 1e4]), torch.zeros(2), beta=1.0), [0.0, 1e4], rtol=0)


def test_npo_subtracts_half_precision_in_single():
    losses = npo(torch.tensor([-3.015625], dtype=torch.bfloat16), torch.tensor([-8.0], dtype=torch.bfloat16), beta=0.5)
    assert losses.dtype == torch.float32
    assert_close(losses, [math.log1p(math.exp(0.5 * 4.984375))], rtol=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [lambda *tensors, beta: npo(*tensors[:2], beta=beta), *PAIRWISE], ids=["npo", *NAMES])
def test_log_probabilities_of_tokens_are_refused(loss):
    with pytest.raises(ValueError, match=r"must be \[N\], one sum per completion, got \[2, 3\]"):
        loss(*[torch.zeros(2, 3)] * 4, beta=0.1)


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN])
@each_loss
def test_pairwise_losses_refuse_a_beta_that_is_not_positive(loss, beta: float):
    with pytest.raises(ValueError, match=f"beta must be > 0, got {beta}"):
        loss(*GOLDEN, beta=beta)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_other_scales_must_be_positive(value: float):
    with pytest.raises(ValueError, match=f"beta must be > 0, got {value}"):
        npo(f64(0.0), f64(0.0), beta=value)
    with pytest.raises(ValueError, match=f"max_reward must be > 0, got {value}"):
        chi_po(*GOLDEN, beta=0.1, max_reward=value)
