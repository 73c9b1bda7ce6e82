"""Masked reductions, KL estimators, effective sample size, and a mean that adds exactly.

Everything here is a pure function of tensors in natural-log units (nats). Shapes: B rows, T completion tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Σ_t m_t·x_t, the sum over kept tokens.

    Args:
        values: [B, T] any float dtype; what stands where the mask is False is never read, so it may be NaN.
        mask: [B, T] bool, True = use.

    Returns:
        [B] in the dtype of `values`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    return values.masked_fill(~mask, 0.0).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Σ m·x / Σ m over all kept tokens of the batch (a token mean, not a mean of row means).

    Args:
        values: any shape.
        mask: same shape, bool, True = use.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes differ, or nothing is kept.
    """
    require_same_shape(values=values, mask=mask)
    count = mask.sum()
    if not count:
        raise ValueError("masked_mean of an empty selection: the mask keeps no element")
    return values.masked_fill(~mask, 0.0).sum() / count


def kl_k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """k1 = log p − log q: unbiased for KL(p‖q) under samples of p, may be negative.

    Args:
        logprobs: log p of the sampled tokens or completions, under the distribution that sampled them.
        other_logprobs: log q, same shape.

    Returns:
        Same shape. Schulman 2020, "Approximating KL divergence".
    """
    require_same_shape(logprobs=logprobs, other_logprobs=other_logprobs)
    return logprobs - other_logprobs


def kl_k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """k3 = e^u − u − 1 with u = log q − log p: unbiased for KL(p‖q) under samples of p, never negative.

    Args and shape as `kl_k1`. Schulman 2020, "Approximating KL divergence". Computed with expm1: for small u the
    difference e^u − 1 would otherwise lose every digit.
    """
    require_same_shape(logprobs=logprobs, other_logprobs=other_logprobs)
    log_ratio = other_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def effective_sample_size(weights: Tensor) -> Tensor:
    """ESS = (Σ w)² / Σ w², the number of equally weighted samples that carry the same information.

    Args:
        weights: [B] ≥ 0.

    Returns:
        A scalar in [1, B], or 0 when every weight is 0 (no sample carries anything). Kish 1965.
    """
    # Scaling by the largest weight keeps w² inside fp32 whatever the units of w.
    largest = weights.max()
    if largest == 0:
        return torch.zeros_like(largest)
    scaled = weights / largest
    return scaled.sum().square() / scaled.square().sum()


@dataclass(frozen=True)
class Mean:
    """A mean kept as (total, count), so that adding parts gives the mean of the whole, not a mean of means."""

    total: float = 0.0
    count: float = 0.0

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Mean:
        """The parts of the mean of `values` (where `mask` is True), summed in float64."""
        if mask is not None:
            values = values[mask]
        return cls(float(values.double().sum()), float(values.numel()))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """total / count; an empty mean is an error, not a 0.

        Raises:
            ValueError: nothing was added.
        """
        if not self.count:
            raise ValueError("the mean of nothing is undefined: no value was added")
        return self.total / self.count


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def require_positive(**numbers: float) -> None:
    """Raises ValueError naming a number that is not > 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be > 0, got {number}")


def require_not_negative(**numbers: float) -> None:
    """Raises ValueError naming a number that is negative or not finite."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be ≥ 0 and finite, got {number}")


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError naming every tensor's shape unless all shapes agree."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"shapes must agree: {listing}")
