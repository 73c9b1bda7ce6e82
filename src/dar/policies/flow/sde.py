"""The flow's ODE as an SDE with the same marginals: steps that are Gaussian, and so have log-probabilities.

A rectified flow moves x_t = (1 − t) x_0 + t ε along the velocity v(x_t, t) ≈ ε − x_0, from noise (t = 1) to data
(t = 0). With noise of strength σ_t (Liu et al. 2025, arXiv:2505.05470, eq. 9; Xue et al. 2025, arXiv:2505.07818)

    x_{t−Δ} = μ + σ_t √Δ ε,   μ = x_t − Δ [ v + σ_t²/(2t) (x_t + (1 − t) v) ]

and with σ = 0 this is Euler's step of the ODE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dar.config.flow import FlowSDESpec


@dataclass(frozen=True)
class SDE:
    """The grid of a trajectory.

    times: [T + 1] fp32, falling from 1 to 0.
    sigmas: [T] fp32, σ of each step; 0 is the ODE.
    reweights: [T] δ of each step, of mean 1, so that reweighting changes no learning rate.
    """

    times: Tensor
    sigmas: Tensor
    reweights: Tensor

    @property
    def deviations(self) -> Tensor:
        """[T] σ √Δ, the standard deviation of each step in every dimension."""
        return self.sigmas * (-self.times.diff()).sqrt()

    def means(self, states: Tensor, velocities: Tensor, steps: Tensor) -> Tensor:
        """μ of some steps, from their [N, D] x_t and v, and [N] which steps they are."""
        time, end, sigma = (values[steps].unsqueeze(1) for values in (self.times, self.times[1:], self.sigmas))
        drift = velocities + sigma**2 / (2 * time) * (states + (1 - time) * velocities)
        return states - (time - end) * drift


def build_sde(spec: FlowSDESpec, device: torch.device | str = "cpu") -> SDE:
    """The grid of a spec, its noise, and GRPO-Guard's δ (arXiv:2510.22319): 1/Δ, or of DanceGRPO's noise β/Δ with
    β = 1 + η² (1 − t)/(2t), the factor of v in μ/Δ (for Flow-GRPO's the same in every step but the first)."""
    even = torch.linspace(1.0, 0.0, spec.steps + 1, device=device)
    times = spec.shift * even / (1 + (spec.shift - 1) * even)
    inverse = -1 / times.diff()
    if spec.noise == "dance_grpo":
        sigmas = torch.full_like(inverse, spec.eta)
        inverse *= 1 + spec.eta**2 * (1 - times[:-1]) / (2 * times[:-1])
    else:
        # σ_t is infinite at t = 1: Flow-GRPO's code takes the time after it.
        inside = times[:-1].clamp(max=float(times[1]))
        sigmas = spec.eta * (inside / (1 - inside)).sqrt()
    return SDE(times, sigmas, inverse / inverse.mean())


def gaussian_logprobs(values: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """[N, D] log N(x; μ, s²) of every dimension by itself, in nats; `deviations` [N] s > 0."""
    spread = deviations.unsqueeze(1)
    return -(((values - means) / spread) ** 2) / 2 - spread.log() - 0.5 * math.log(2 * math.pi)
