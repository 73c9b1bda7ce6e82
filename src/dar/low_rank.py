"""Products of two factors, W = left · right: the rank their spectrum needs, and the best product of that rank.

AdaRL's rule and truncation (Li et al. 2025, 2510.11899), for the layers of a controller and for LoRA adapters alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """r̂ = max(1, max{ℓ : Σ_{i≤ℓ} σ_i / Σ_i σ_i ≤ energy}), the greedy rule of AdaRL.

    The paper's ≤ is kept, where one might expect the smallest ℓ that reaches `energy`: a spectrum whose first value
    holds more than that share still keeps one. A share that equals `energy` up to rounding counts as equal.

    Args:
        singular_values: [R], none negative, the largest first.
        energy: share of the sum, in (0, 1].

    Returns:
        A rank of 1 to R; 1 where all values are 0.

    Raises:
        ValueError: there is no value, or one is negative or not finite.
    """
    values = singular_values.double()
    if values.numel() == 0 or not bool((values >= 0).all() and values.isfinite().all()):
        raise ValueError("singular_values must be a non-empty list of finite numbers, none negative")
    shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return max(1, int((shares <= energy + 1e-9).sum())) if values.any() else 1


def factored_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of left · right, without forming the product.

    Args:
        left: [N, R].
        right: [R, M].

    Returns:
        U [N, r], σ [r] with the largest first, Vᵀ [r, M]; r = min(N, R, M). In fp64.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    inner_u, values, inner_v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ inner_u, values, inner_v @ q_right.T


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r√Σ_r [N, rank] and √Σ_r V_rᵀ [rank, M]: the product of that rank nearest to left · right.

    Its error in the Frobenius norm is (Σ_{i>rank} σ_i²)^½ (Eckart and Young 1936).

    Raises:
        ValueError: the rank is not between 1 and that of the factors.
    """
    u, values, v = factored_svd(left, right)
    if not 1 <= rank <= len(values):
        raise ValueError(f"rank is {rank}; the factors have 1 to {len(values)}")
    root = values[:rank].sqrt()
    return (u[:, :rank] * root).to(left.dtype), (root[:, None] * v[:rank]).to(right.dtype)
