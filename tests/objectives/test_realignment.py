"""TRACE's parts: the truth table of the triage, the losses of conflicting pairs by hand, impact weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import assert_close, f64, few

from dar.objectives.preference import dpo, npo
from dar.objectives.realignment import Triage, conflict_losses, impact_weights, triage

NAN = math.nan


# --- triage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen_complies", "rejected_complies", "verdict"),
    [
        (False, True, Triage.INVERT),
        (False, False, Triage.PUNISH),
        (True, False, Triage.RETAIN),
        (True, True, Triage.RETAIN),
    ],
)
def test_triage(chosen_complies: bool, rejected_complies: bool, verdict: Triage):
    assert triage(chosen_complies, rejected_complies) is verdict


# --- impact weights --------------------------------------------------------------------------------------------------


def test_impact_weights_by_hand():
    # (2, 0, 0, 6)/8: what pulls against the new rules or across them has no weight, and γ cancels.
    inner_products = f64(2.0, -5.0, 0.0, 6.0)
    assert_close(impact_weights(inner_products), [0.25, 0.0, 0.0, 0.75], rtol=1e-15)
    assert_close(impact_weights(7 * inner_products), [0.25, 0.0, 0.0, 0.75], rtol=1e-15)


@pytest.mark.parametrize("inner_products", [[0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, 0.0, -1e30]])
def test_impact_weights_are_uniform_where_nothing_helps(inner_products: list[float]):
    assert_close(impact_weights(torch.tensor(inner_products)), [0.25] * 4, rtol=0)


def test_impact_weights_of_nothing_are_nothing():
    assert impact_weights(torch.zeros(0)).shape == (0,)


@few
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9), units=st.sampled_from([1e-20, 1.0, 1e38]))
def test_impact_weights_are_a_distribution_in_any_units(seed: int, size: int, units: float):
    inner_products = torch.randn(size, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    weights = impact_weights(units * inner_products)
    assert (weights >= 0).all()
    assert_close(weights.sum(), 1.0, rtol=1e-6)
    assert_close(weights, impact_weights(inner_products), rtol=1e-6)


def test_impact_weights_whose_sum_leaves_single_precision():
    assert_close(impact_weights(torch.full((4,), 3e38)), [0.25] * 4, rtol=0)


def test_impact_weights_do_not_hide_what_is_not_a_number():
    assert impact_weights(torch.tensor([1.0, NAN])).isnan().all()


def test_impact_weights_carry_no_gradient_and_are_single_precision_at_least():
    inner_products = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    weights = impact_weights(inner_products)
    assert not weights.requires_grad
    assert weights.dtype == torch.float32
    assert_close(weights, [0.25, 0.75], rtol=1e-6)


def test_impact_weights_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"inner_products must be \[N\], one per pair, got \[2, 3\]"):
        impact_weights(torch.zeros(2, 3))


# --- losses of conflicting pairs -------------------------------------------------------------------------------------

# LP_θ(w, l) = (−10, −9), LP_0(w, l) = (−12, −9.5): h = (2, .5).
LOGPROBS, REFERENCE = f64(-10.0, -9.0).reshape(1, 2), f64(-12.0, -9.5).reshape(1, 2)
INVERTED, PUNISHED = torch.tensor([True]), torch.tensor([False])


def test_conflicting_pairs_start_at_log_two():
    """At π_θ = π₀: one term of log 2 where the pair is swapped, two where both are pushed down."""
    logprobs = f64(-3.0, -7.0, -5.0, -1.0).reshape(2, 2)
    losses = conflict_losses(logprobs, logprobs, torch.tensor([True, False]), beta=0.3)
    assert_close(losses, [[0.0, math.log(2)], [math.log(2), math.log(2)]], rtol=1e-15)


def test_inverted_pair_by_hand():
    # Swapped, Δ = .5 − 2 = −1.5: log(1 + e^.45); slope −β σ(.45) in LP(l), the opposite in LP(w).
    logprobs = LOGPROBS.clone().requires_grad_()
    losses = conflict_losses(logprobs, REFERENCE, INVERTED, beta=0.3)
    assert_close(losses, [[0.0, math.log1p(math.exp(0.45))]], rtol=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    slope = 0.3 / (1 + math.exp(-0.45))
    assert_close(grad, [[slope, -slope]], rtol=1e-12)


def test_punished_pair_by_hand():
    # The golden NPO at β h = .6, and log(1 + e^.15) at h = .5; both log-probabilities are pushed down.
    logprobs = LOGPROBS.clone().requires_grad_()
    losses = conflict_losses(logprobs, REFERENCE, PUNISHED, beta=0.3)
    assert_close(losses, [[1.03748795, math.log1p(math.exp(0.15))]], rtol=0, atol=6e-9)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert_close(grad, [[0.19369689, 0.3 / (1 + math.exp(-0.15))]], rtol=0, atol=6e-9)


@few
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 3))
def test_inversion_is_dpo_on_the_swapped_pair_and_swapping_twice_is_dpo(seed: int, beta: float):
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = (-20 * torch.rand(4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    everywhere = torch.ones(4, dtype=torch.bool)
    once = conflict_losses(logprobs, reference, everywhere, beta=beta).sum(1)
    assert_close(once, dpo(*logprobs.flip(1).unbind(1), *reference.flip(1).unbind(1), beta=beta), rtol=1e-12)
    twice = conflict_losses(logprobs.flip(1), reference.flip(1), everywhere, beta=beta).sum(1)
    assert_close(twice, dpo(*logprobs.unbind(1), *reference.unbind(1), beta=beta), rtol=1e-12)
    punished = conflict_losses(logprobs, reference, ~everywhere, beta=beta)
    assert_close(punished[:, 0], npo(logprobs[:, 0], reference[:, 0], beta=beta), rtol=1e-12)
    assert_close(punished[:, 1], npo(logprobs[:, 1], reference[:, 1], beta=beta), rtol=1e-12)


@pytest.mark.parametrize(("shape", "marks"), [((3,), 3), ((3, 3), 3), ((3, 2), 2)])
def test_conflict_losses_refuse_other_shapes(shape: tuple[int, ...], marks: int):
    with pytest.raises(ValueError, match=r"logprobs must be \[N, 2\] and is_inverted \[N\], got"):
        conflict_losses(torch.zeros(shape), torch.zeros(shape), torch.zeros(marks, dtype=torch.bool), beta=0.3)
    with pytest.raises(ValueError, match=r"logprobs \[1, 2\], ref_logprobs \[2, 2\]"):
        conflict_losses(torch.zeros(1, 2), torch.zeros(2, 2), INVERTED, beta=0.3)
