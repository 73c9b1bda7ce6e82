"""DAR's β from a stated trust region: how far the regression's target may lie from the policy that sampled.

DAR's log weight is log w = A/β + c, with c = α·(LP_0 − LP_t) the part that does not depend on β. The rows are samples
of π_t, so p = w / Σ w is the regression's target on the batch, and π_t gives every row 1/N. Both distances below
compare p with 1/N over all rows of the batch, prompts pooled. By the chain rule the KL is then the mean KL of the
prompts (each weighted by its share of p) plus that of the weight moved between prompts, hence a bound on the former.

All of this is derived here: the paper fixes β. Nothing carries a gradient, and everything is float64 on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import root_scalar
from torch import Tensor

from dar.ops import effective_sample_size, require_same_shape

BRACKET = 1e6
"""β is sought between the range of the advantages (largest − smallest) divided and multiplied by this."""

POINTS_PER_DECADE = 16


@dataclass(frozen=True)
class AdaptiveBeta:
    """A β, in the units of the advantages, and what it brings."""

    beta: float
    """> 0 and finite, always."""
    achieved: float
    """The KL in nats, or ESS/N, at this β and before any clipping."""
    is_reached: bool
    """`achieved` is the target within rounding; otherwise `beta_for_kl` says which β this is."""


@torch.no_grad()
def weights_kl(log_weights: Tensor) -> Tensor:
    """KL of the regression's target from the policy that sampled: Σ_i p_i log(N p_i), p = softmax(log w).

    A plug-in estimate of KL(π_t·w / E[w] ‖ π_t) that cannot exceed log N, however far away the target lies.

    Args:
        log_weights: [N] the log weights of the whole batch, any additive constant.

    Returns:
        A float64 scalar in [0, log N], nats: 0 for equal weights, log N when one row has all the weight.

    Raises:
        ValueError: not one non-empty row of finite numbers.

    Derived from He et al. 2026, arXiv:2602.11523, Thm 4.2.
    """
    _require_finite_row(log_weights=log_weights)
    log_p = torch.log_softmax(log_weights.to("cpu", torch.float64), dim=0)
    log_n = math.log(len(log_p))
    # Rounding takes the sum below 0 where the weights are nearly equal.
    return (log_p.exp() * (log_n + log_p)).sum().clamp(min=0.0)


def beta_for_kl(advantages: Tensor, log_w_reg: Tensor, *, target_kl: float) -> AdaptiveBeta:
    """The β at which the target's KL from π_t is `target_kl`.

        Σ_i p_i log(N p_i) = target_kl,   p = softmax(A/β + c)

    Along t = 1/β the p are an exponential family, and dKL/dt = Cov_p(A, log w) = t·Var_p(A) + Cov_p(A, c) (dp_i/dt =
    p_i (A_i − E_p A), and the normaliser's two derivatives cancel). Hence:

    * c = 0: the KL falls strictly with β, from log(N / number of rows with the largest A) at β → 0 to 0 at β → ∞, and
      the β is the only one.
    * c ≠ 0: the KL starts from `weights_kl(c)` at β → ∞, may fall first where the rewards pull against c, and ends at
      log N minus the entropy of softmax(c) over the rows with the largest A. Of several β the one returned is the
      largest at which the KL *rises* through the target as β falls. There, as with c = 0, a larger β is a smaller step;
      and it moves continuously when `weights_kl(c)` passes the target, where a root at which the KL falls would come
      out of β = ∞.

    Where there is none, `is_reached` is False:

    * The KL exceeds the target at every β: `beta` is that of the smallest KL. With c = 0, or if the rewards do not pull
      against c, it is the largest of the bracket: the step then takes no notice of the rewards and c alone pulls π_θ
      back towards π₀.
    * From some β on the KL stays below the target down to the smallest β of the bracket, which is then returned: too
      many ties of the best, or too few rows (log N < target). Its log weights reach 1e6, so clip them before the
      exponential.
    * All advantages are equal, so that β changes nothing: `beta` is 1.0.

    The β is searched for between 1e-6 and 1e6 ranges of the advantages (largest − smallest) on a grid of 16 points per
    decade, then solved for; a fall and rise of the KL between two grid points is not seen. β follows the scale of the
    advantages and ignores their shift: advantages that are nothing but rounding noise get a β as small as they are.

    Clipping w from above afterwards never raises the KL and never lowers the ESS. q = min(p, κ)/Σ min(p, κ) keeps the
    order of p, and q/p falls as p rises; both sum to 1, so q ≤ p on the largest rows and q ≥ p on the others: p
    majorises q, and Σ p log p and Σ p² are Schur-convex. `achieved` thus bounds the KL from above under any w_clip.

    Args:
        advantages: [N] reward units, all rows of the batch.
        log_w_reg: [N] nats, c = α·(LP_0 − LP_t); zeros for α = 0.
        target_kl: nats, > 0.

    Returns:
        The β, the KL it achieves, and whether that is the target.

    Raises:
        ValueError: shapes differ, not one non-empty row of finite numbers, or target_kl is not a finite number > 0.

    Derived; for A ~ N(0, 1) and c = 0 the KL is 1/(2β²).
    """
    if not 0 < target_kl < math.inf:
        raise ValueError(f"target_kl must be a finite number of nats > 0, got {target_kl}")
    return AdaptiveBeta(*_beta_for(advantages, log_w_reg, target_kl, lambda log_w: weights_kl(log_w).item()))


def beta_for_ess(advantages: Tensor, log_w_reg: Tensor, *, target_ess: float) -> AdaptiveBeta:
    """The β at which the share of effective samples is `target_ess`.

        ESS/N = 1 / (N Σ_i p_i²) = target_ess,   p = softmax(A/β + c)

    Everything `beta_for_kl` says holds with −log(ESS/N), the Rényi divergence of order 2, in the place of the KL. Its
    derivative along t = 1/β is 2 (E_q A − E_p A) with q ∝ p²; for c = 0 q is p at 2t, and E_p A rises with t, so ESS
    rises strictly with β, from the number of rows with the largest A to N.

    Args:
        advantages, log_w_reg: as for `beta_for_kl`.
        target_ess: share of the rows, in (0, 1]. 1 is the limit β → ∞ (c = 0) and so comes with `is_reached` False.

    Returns:
        The β, the ESS/N it achieves, and whether that is the target.

    Raises:
        ValueError: as for `beta_for_kl`, or target_ess outside (0, 1].

    Derived; for A ~ N(0, 1) and c = 0 ESS/N = exp(−1/β²). ESS: Kish 1965.
    """
    if not 0 < target_ess <= 1:
        raise ValueError(f"target_ess is a share of the rows and must lie in (0, 1], got {target_ess}")
    beta, divergence, is_reached = _beta_for(advantages, log_w_reg, -math.log(target_ess), _renyi_two)
    return AdaptiveBeta(beta, math.exp(-divergence), is_reached)


def _renyi_two(log_weights: Tensor) -> float:
    share = effective_sample_size(torch.softmax(log_weights, dim=0)).item() / len(log_weights)
    return max(0.0, -math.log(share))


@torch.no_grad()
def _beta_for(
    advantages: Tensor, log_w_reg: Tensor, target: float, divergence: Callable[[Tensor], float]
) -> tuple[float, float, bool]:
    require_same_shape(advantages=advantages, log_w_reg=log_w_reg)
    _require_finite_row(advantages=advantages, log_w_reg=log_w_reg)
    scores, log_w_reg = (tensor.to("cpu", torch.float64) for tensor in (advantages, log_w_reg))
    scale = (scores.max() - scores.min()).item()
    if scale == 0:
        return 1.0, divergence(log_w_reg), False
    scores = (scores - scores.max()) / scale

    def excess(log_t: float) -> float:
        return divergence(scores * math.exp(log_t) + log_w_reg) - target

    # t = scale/β rises along the grid, so β falls.
    half = round(math.log10(BRACKET)) * POINTS_PER_DECADE
    grid = [math.log(10) * k / POINTS_PER_DECADE for k in range(-half, half + 1)]
    excesses = [excess(log_t) for log_t in grid]
    rising = next((k for k in range(1, len(grid)) if excesses[k - 1] < 0 <= excesses[k]), None)
    if rising is not None:
        log_t = root_scalar(excess, bracket=(grid[rising - 1], grid[rising]), method="brentq", xtol=1e-14).root
        return scale * math.exp(-log_t), excess(log_t) + target, True
    # Nothing rises through the target: either the grid ends below it, or all of the grid lies above.
    nearest = len(grid) - 1 if excesses[-1] < 0 else excesses.index(min(excesses))
    return scale * math.exp(-grid[nearest]), excesses[nearest] + target, False


def _require_finite_row(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or not tensor.numel():
            raise ValueError(f"{name} must be one row of at least one number, got shape {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite, got {(~tensor.isfinite()).sum()} of {len(tensor)} that are not")
