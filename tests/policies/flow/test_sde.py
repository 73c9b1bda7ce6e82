"""The SDE's steps against the formulas they come from."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from dar.config.flow import FlowSDESpec
from dar.policies.flow.sde import build_sde


def test_without_noise_it_is_eulers_step():
    sde = replace(build_sde(FlowSDESpec(steps=4)), sigmas=torch.zeros(4))
    states, velocities = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    assert torch.equal(sde.means(states, velocities, torch.tensor([1])), states - 0.25 * velocities)


def test_sigmas_of_flow_grpo_are_finite_at_the_start():
    # √(t/(1−t)) at t = 3/4 (for t = 1), 3/4, 1/2, 1/4
    sde = build_sde(FlowSDESpec(steps=4, eta=0.5))
    torch.testing.assert_close(sde.sigmas, 0.5 * torch.tensor([3.0, 3.0, 1.0, 1 / 3]).sqrt())


def test_sigmas_of_dance_grpo_are_constant():
    assert build_sde(FlowSDESpec(steps=3, noise="dance_grpo", eta=0.3)).sigmas.tolist() == pytest.approx([0.3] * 3)


def test_shift_bends_the_grid_towards_noise():
    # s t/(1 + (s−1) t) with s = 3 at t = 1, 1/2, 0
    assert build_sde(FlowSDESpec(steps=2, shift=3.0)).times.tolist() == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("noise", ["flow_grpo", "dance_grpo"])
def test_marginals_are_those_of_the_flow(noise: Literal["flow_grpo", "dance_grpo"]):
    # Data N(2, .5²) in one dimension, whose velocity is known: many small steps must end in that distribution.
    sde = build_sde(FlowSDESpec(steps=400, noise=noise, eta=0.5))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(20_000, 1, generator=generator)
    for step in range(len(sde.sigmas)):
        time = float(sde.times[step])
        mean, variance = (1 - time) * 2, ((1 - time) * 0.5) ** 2 + time**2
        # E[ε − x_0 | x_t] of jointly Gaussian x_0, ε.
        slope = (time - (1 - time) * 0.25) / variance
        velocities = -2 + slope * (states - mean)
        steps = torch.full((len(states),), step)
        means = sde.means(states, velocities, steps)
        states = means + sde.deviations[step] * torch.randn(states.shape, generator=generator)
    assert float(states.mean()) == pytest.approx(2, abs=0.02)
    assert float(states.std()) == pytest.approx(0.5, abs=0.02)
