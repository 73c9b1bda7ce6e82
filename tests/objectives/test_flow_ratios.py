"""Ratios of denoising steps against their definition, and GRPO-Guard's against its golden values."""

import math

import pytest
import torch

from dar.objectives.flow import step_log_ratios


def log_density(values, mean, deviation):
    return torch.distributions.Normal(mean, deviation).log_prob(values).sum(-1)


def test_golden_values_of_grpo_guard():
    # Δμ = μ_t − μ_θ = (.1, −.2), ε = (1, .25), σ = .7, dt = .1
    deviation = torch.tensor([[0.7 * math.sqrt(0.1)]])
    old_mean, noise = torch.tensor([0.3, 0.4]), torch.tensor([1.0, 0.25])
    mean = old_mean - torch.tensor([0.1, -0.2])
    values = old_mean + deviation[0] * noise
    logprob, old = (
        log_density(values, mean, deviation[0]).view(1, 1),
        log_density(values, old_mean, deviation[0]).view(1, 1),
    )
    shift = ((mean - old_mean) * noise).sum().view(1, 1)
    found = {
        ratio: float(step_log_ratios(logprob - old, shift, deviation, ratio=ratio))
        for ratio in ("plain", "centered", "normalized")
    }
    assert found["plain"] == pytest.approx(-0.73608106, abs=1e-6)
    assert found["normalized"] == pytest.approx(-0.05, abs=1e-7)
    # ‖Δμ‖² = .05 and σ² dt = .049
    assert found["centered"] == pytest.approx(found["plain"] + 0.05 / (2 * 0.049), abs=1e-6)
    assert found["normalized"] == pytest.approx(float(deviation) * found["centered"], abs=1e-7)


@pytest.mark.parametrize("deviation", [0.1, 0.5])
def test_moments_over_the_noise(deviation: float):
    # d is the same at either deviation: RatioNorm's spread must not know which it is.
    generator = torch.Generator().manual_seed(0)
    difference = torch.tensor([0.02, -0.01, 0.03])
    noise = torch.randn(400_000, 3, generator=generator)
    values = deviation * noise
    logprob, old = log_density(values, difference, deviation), log_density(values, torch.zeros(3), deviation)
    shift = (difference * noise).sum(-1)
    found = {
        ratio: step_log_ratios(logprob - old, shift, torch.full_like(shift, deviation), ratio=ratio).double()
        for ratio in ("plain", "normalized")
    }
    squared = float(difference.square().sum())
    error = math.sqrt(squared) / deviation / math.sqrt(len(noise))
    assert float(found["plain"].mean()) == pytest.approx(-squared / (2 * deviation**2), abs=4 * error)
    assert float(found["normalized"].mean()) == pytest.approx(0, abs=4 * math.sqrt(squared / len(noise)))
    assert float(found["normalized"].std()) == pytest.approx(math.sqrt(squared), rel=0.01)
