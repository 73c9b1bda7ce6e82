"""Learning-rate schedules and what the optimizers are built with."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dar.config.optim import AdafactorSpec, AdamWSpec
from dar.errors import NonFiniteError
from dar.learn.optim import (
    build_optimizer,
    clipped_step,
    learning_rate_factor,
    set_learning_rate,
)

Schedule = Literal["constant", "linear", "cosine"]


def factors(schedule: Schedule, *, warmup_steps: int, total_steps: int) -> list[float]:
    return [
        learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(total_steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warm-up (n + 1)/4 in steps 0 … 3, then progress 0, ¼, ½, ¾ of the four steps that are left.
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        # ½ (1 + cos(π/4)) = .85355339 and ½ (1 − cos(π/4)) = .14644661.
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
    ],
)
def test_schedules_step_by_step(schedule: Schedule, expected: list[float]):
    assert factors(schedule, warmup_steps=4, total_steps=8) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: Schedule):
    assert factors(schedule, warmup_steps=0, total_steps=5)[0] == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedules_reach_zero_just_after_the_last_step(schedule: Schedule):
    assert learning_rate_factor(7, schedule=schedule, warmup_steps=2, total_steps=7) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total_steps", [3, 5])
def test_warm_up_may_fill_the_run_or_outlast_it(schedule: Schedule, total_steps: int):
    rising = [(step + 1) / 5 for step in range(total_steps)]
    assert factors(schedule, warmup_steps=5, total_steps=total_steps) == pytest.approx(rising, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.integers(0, 20),
    total_steps=st.integers(1, 60),
)
def test_factors_rise_to_one_and_never_leave_the_unit_interval(schedule: Schedule, warmup_steps: int, total_steps: int):
    curve = factors(schedule, warmup_steps=warmup_steps, total_steps=total_steps)
    assert all(0 < factor <= 1 for factor in curve)
    rise, rest = curve[:warmup_steps], curve[warmup_steps:]
    assert rise == sorted(rise)
    assert rest == sorted(rest, reverse=True)


def test_set_learning_rate_reaches_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, AdamWSpec(learning_rate=0.25), 0, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_adamw_gets_every_setting():
    spec = AdamWSpec(learning_rate=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(spec, iter([torch.nn.Parameter(torch.zeros(1))]))
    assert isinstance(optimizer, torch.optim.AdamW)
    settings_of = {name: optimizer.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert settings_of == {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def test_adafactor_rate_is_absolute():
    # A rate relative to the parameter's scale would move the large one a thousand times further. In the first step the
    # second moment is the gradient's own square, so every entry moves by the rate.
    parameters = [torch.nn.Parameter(torch.full((4, 4), scale)) for scale in (1.0, 1000.0)]
    optimizer = build_optimizer(AdafactorSpec(learning_rate=0.5), parameters)
    for parameter in parameters:
        parameter.grad = torch.full((4, 4), 3.0)
    optimizer.step()
    for parameter, scale in zip(parameters, (1.0, 1000.0), strict=True):
        torch.testing.assert_close(parameter.data, torch.full((4, 4), scale - 0.5), rtol=1e-6, atol=1e-6)


def test_a_step_follows_the_gradient_scaled_down_to_the_norm():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clipped_step(torch.optim.SGD([weight], lr=1.0), [weight], 1.0, where="step 7") == pytest.approx(5.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    assert weight.grad is None


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_gone():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(NonFiniteError, match=r"gradient is not finite at step 7 .* weights were not changed"):
        clipped_step(torch.optim.SGD([weight], lr=1.0), [weight], 1.0, where="step 7")
    assert weight.tolist() == [1.0, 1.0]
    assert weight.grad is None


@pytest.mark.parametrize("spec", [AdamWSpec(learning_rate=1e38), AdamWSpec(weight_decay=1e38), AdafactorSpec()])
def test_weights_that_a_step_has_overflowed_are_refused(spec: AdamWSpec | AdafactorSpec):
    weight = torch.nn.Parameter(torch.full((2, 2), -3.3e38))
    optimizer = build_optimizer(spec, [weight])
    set_learning_rate(optimizer, AdamWSpec(learning_rate=3e38), 0, 1)
    weight.grad = torch.ones(2, 2)
    with pytest.raises(NonFiniteError, match=r"the update at step 7 overflowed: weights or .* lower optim"):
        clipped_step(optimizer, [weight], 1.0, where="step 7")


def test_moments_that_overflow_are_refused_before_they_show_in_the_weights():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(AdamWSpec(beta2=0.0), [weight])
    # Finite, and so is its norm; its square is not.
    weight.grad = torch.full((1,), 2e19)
    with pytest.raises(NonFiniteError, match="the update at step 7 overflowed: weights or the optimizer's moments"):
        clipped_step(optimizer, [weight], 1e38, where="step 7")
    assert weight.isfinite().all()


def test_weights_whose_norm_alone_overflows_are_finite():
    weight = torch.nn.Parameter(torch.full((2,), 1e30))
    weight.grad = torch.ones(2)
    assert clipped_step(torch.optim.SGD([weight], lr=1.0), [weight], 10.0, where="step 7") == pytest.approx(2**0.5)
