"""Bradley–Terry and the centring term: values and slopes by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.builders import assert_close, f64

from dar.objectives.reward_model import bradley_terry, centering


def test_equal_scores_cost_log_2():
    assert_close(bradley_terry(f64(0.7), f64(0.7)), [math.log(2)], rtol=1e-12)


def test_a_lead_of_log_3_is_three_to_one():
    # σ(log 3) = 3/4, so the right label costs log(4/3) and the wrong one log 4.
    lead = math.log(3)
    assert_close(bradley_terry(f64(lead, 0.0), f64(0.0, lead)), [math.log(4 / 3), math.log(4)], rtol=1e-12)


def test_margin_moves_the_lead():
    # A lead of 3 with a margin of 3 is no lead.
    assert_close(bradley_terry(f64(1.0), f64(-2.0), margin=f64(3.0)), [math.log(2)], rtol=1e-12)


def test_label_smoothing_mixes_both_labels():
    # 0.9 · log(4/3) + 0.1 · log 4
    lead = f64(math.log(3))
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert_close(bradley_terry(lead, f64(0.0), label_smoothing=0.1), [expected], rtol=1e-12)


def test_slope_is_the_doubt_that_is_left():
    # dℓ/dr_c = −(1 − σ(d)) + ε = −σ(−d) + ε, and the opposite for r_r; with d = log 3: −1/4 + 0.1 = −0.15.
    chosen, rejected = f64(math.log(3) + 0.5).requires_grad_(), f64(-0.5).requires_grad_()
    loss = bradley_terry(chosen, rejected, margin=f64(1.0), label_smoothing=0.1)
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert_close(up, [-0.15], rtol=1e-9)
    assert_close(down, [0.15], rtol=1e-9)


def test_smoothed_loss_is_least_at_the_log_odds_of_the_labels():
    # −(1−ε) log σ(d) − ε log σ(−d) is least where σ(d) = 1 − ε: d = log 9 for ε = 0.1, where its slope is 0.
    chosen = f64(math.log(9)).requires_grad_()
    (slope,) = torch.autograd.grad(bradley_terry(chosen, f64(0.0), label_smoothing=0.1).sum(), [chosen])
    assert_close(slope, [0.0], rtol=0, atol=1e-12)


def test_extreme_leads_stay_finite():
    assert_close(bradley_terry(torch.tensor([-1e4, 1e4]), torch.zeros(2)), [1e4, 0.0], rtol=1e-6)


def test_centering_is_the_squared_sum_and_pulls_both_alike():
    chosen, rejected = f64(2.0, 1.0).requires_grad_(), f64(1.0, -1.0).requires_grad_()
    found = centering(chosen, rejected)
    assert_close(found, [9.0, 0.0], rtol=0)
    up, down = torch.autograd.grad(found.sum(), [chosen, rejected])
    assert_close(up, [6.0, 0.0], rtol=0)
    assert_close(down, [6.0, 0.0], rtol=0)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="one number per pair"):
        bradley_terry(f64(1.0, 2.0), f64(1.0))
    with pytest.raises(ValueError, match="one number per pair"):
        bradley_terry(f64(1.0), f64(1.0), margin=f64(1.0, 2.0))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\)"):
        bradley_terry(f64(1.0), f64(1.0), label_smoothing=0.5)
    with pytest.raises(ValueError, match="one number per pair"):
        centering(torch.zeros(2, 2), torch.zeros(2, 2))
