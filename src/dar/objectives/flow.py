"""Ratios of denoising steps. A step x' = μ_t + s ε of the policy that sampled has log ρ = d·ε/s − ‖d‖²/(2 s²) under
π_θ, with d = μ_θ − μ_t: its mean is below 0 and its deviation ‖d‖/s differs by step, so no one clip range fits."""

from __future__ import annotations

from torch import Tensor

from dar.config.flow import Ratio
from dar.ops import require_same_shape


def step_log_ratios(log_ratios: Tensor, shifts: Tensor, deviations: Tensor, *, ratio: Ratio) -> Tensor:
    """The log-ratio of each step that is clipped.

        plain:       log ρ
        centered:    log ρ + ‖d‖²/(2 s²) = d·ε/s      mean 0
        normalized:  s (log ρ + ‖d‖²/(2 s²)) = d·ε    mean 0, deviation ‖d‖ whatever the step's noise

    Args:
        log_ratios: [B, T] log π_θ − log π_t, a sum or mean over the image's dimensions. The gradient flows here, or
        shifts: [B, T] d·ε, likewise, here.
        deviations: [B, T] s > 0.
        ratio: which of the three.

    Raises:
        ValueError: shapes differ.

    GRPO-Guard's RatioNorm, arXiv:2510.22319.
    """
    require_same_shape(log_ratios=log_ratios, shifts=shifts, deviations=deviations)
    return {"plain": log_ratios, "centered": shifts / deviations, "normalized": shifts}[ratio]
