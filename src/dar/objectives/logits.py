"""LCO, logits convex optimisation: regression of the logits on those of the KL-regularised optimum, token by token.

The optimum of E_π[A] − β KL[π‖π_t] at one position is π* ∝ π_t e^{A/β}, in logits z* = z_t + A/β. Each loss here
is convex in the logits of π_θ. Without a critic for tokens the advantage is *sparse*: the completion's A at the sampled
token, 0 at all others.

The forms are those of the authors' training code (arXiv:2603.00963; the text of the paper was not seen), with one
exception: that code's squared and log-cosh losses aim at sg(z_θ) + A/β, which moves along with z_θ and makes the
residual a constant −A/β; here the target is z_t + A/β and stays. Gradients and closed forms are derived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar.ops import at_least_fp32, require_positive, require_same_shape


@torch.no_grad()
def lco_target(old_logits: Tensor, advantages: Tensor, actions: Tensor, *, beta: float) -> Tensor:
    """log π*, the optimum for an advantage at the sampled token alone.

        log π* = log softmax(z_t + (A/β) e_a)

    so π*(a) = p_a e^{A/β} / D and π*(v) = p_v / D elsewhere, with p = π_t and D = 1 − p_a + p_a e^{A/β}.

    Args:
        old_logits: [M, V] finite logits of π_t at M positions.
        advantages: [M] reward units, of the sampled token.
        actions: [M] int64, the sampled token.
        beta: KL weight, reward units per nat, > 0.

    Returns:
        [M, V] nats, fp32 or better, no gradient.

    Raises:
        ValueError: shapes differ or beta ≤ 0.

    arXiv:2603.00963, the authors' code ("sparse" advantages); π*(a) derived.
    """
    require_positive(beta=beta)
    require_same_shape(advantages=advantages, actions=actions, rows=old_logits[:, 0])
    logits = at_least_fp32(old_logits)
    bonus = (at_least_fp32(advantages) / beta).to(logits.dtype)
    return logits.scatter_add(1, actions.unsqueeze(1), bonus.unsqueeze(1)).log_softmax(1)


def lco_kld(logits: Tensor, old_logits: Tensor, advantages: Tensor, actions: Tensor, *, beta: float) -> Tensor:
    """LCO-KLD: the forward KL from the optimum to the policy, over the whole vocabulary.

        L = Σ_v π*(v) [log π*(v) − log π_θ(v)],   π* = exp(`lco_target`), fixed

    The gradient in the logits is π_θ − π*, the Hessian diag(π_θ) − π_θ π_θᵀ ⪰ 0: however far off the policy is, the
    gradient is shorter than √2.

    Args:
        logits: [M, V] logits of π_θ; the gradient flows here.
        old_logits, advantages, actions, beta: as for `lco_target`.

    Returns:
        [M] nats, unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or beta ≤ 0.

    arXiv:2603.00963, the authors' code; gradient and Hessian derived.
    """
    require_same_shape(logits=logits, old_logits=old_logits)
    target = lco_target(old_logits, advantages, actions, beta=beta)
    return (target.exp() * (target - at_least_fp32(logits).log_softmax(1))).sum(1)


def lco_kld_on_policy(logprobs: Tensor, advantages: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """LCO-KLD where π_θ = π_t, from the log-probability p of the sampled token alone.

        value     KL(π*‖π_t) = π*(a) A/β − log D,    D = 1 − p + p e^{A/β},   π*(a) = p e^{A/β} / D
        gradient  −c ∇ log π_θ(a),                   c = p (e^{A/β} − 1) / D

    Valid for the first update of a batch only: afterwards π_θ ≠ π_t and `lco_kld` is needed.

    Derived: the gradient of `lco_kld` in the logits is π_θ − π*, at π_θ = π_t therefore p_v (1 − 1/D) = c p_v for
    v ≠ a and p (1 − e^{A/β}/D) = −c (1 − p) for a. That is −c (e_a − π_θ), and e_a − π_θ is the gradient of
    log π_θ(a). For small A/β, c ≈ p A/β: the policy gradient, times the probability of the token. c < 1 always, but
    it is about −p/(1 − p) for A/β ≪ 0: large where p is close to 1 and ∇ log π_θ(a) accordingly small.

    Args:
        logprobs: [B, T] nats under π_θ = π_t; the gradient flows here.
        advantages: [B] reward units.
        mask: [B, T] bool, True on sampled tokens, EOS included.
        beta: KL weight, reward units per nat, > 0.

    Returns:
        [B, T] nats, fp32 or better, unreduced, 0 where the mask is False.

    Raises:
        ValueError: shapes differ or beta ≤ 0.

    arXiv:2603.00963, the authors' code, for `lco_kld`; this form is derived. Finite for any finite A/β: 1 − p is taken
    to be at least the machine epsilon of `logprobs`, because where log p is rounded to 0 its true size is lost.
    """
    require_positive(beta=beta)
    require_same_shape(logprobs=logprobs, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    kept = at_least_fp32(logprobs).masked_fill(~mask, 0.0)
    value, coefficient = _kl_and_coefficient(
        kept.detach().double().clamp(max=-torch.finfo(logprobs.dtype).eps),
        (advantages.detach().double() / beta).unsqueeze(1),
    )
    # The second term is 0 and carries the gradient.
    losses = value.to(kept.dtype) - coefficient.to(kept.dtype) * (kept - kept.detach())
    return losses.masked_fill(~mask, 0.0)


def lco_mse(
    logits_of_actions: Tensor, old_logits_of_actions: Tensor, advantages: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """LCO-MSE: (z_θ(a) − z_t(a) − A/β)², the squared distance of the sampled token's logit from its optimum.

    On raw logits: adding a constant to all logits of a position changes the loss, though not the policy. Standardise
    with log-softmax before, if that matters. With z_t = z_θ the gradient is that of the authors' code, −2A/β.

    Args:
        logits_of_actions: [B, T] z_θ of the sampled tokens; the gradient flows here.
        old_logits_of_actions: [B, T] z_t of the sampled tokens, no gradient.
        advantages: [B] reward units.
        mask: [B, T] bool, True on sampled tokens, EOS included.
        beta: KL weight, reward units per nat, > 0.

    Returns:
        [B, T] unreduced, fp32 or better, 0 where the mask is False.

    Raises:
        ValueError: shapes differ or beta ≤ 0.

    arXiv:2603.00963, the authors' code, with the fixed target z_t + A/β.
    """
    return _residual(logits_of_actions, old_logits_of_actions, advantages, mask, beta).square()


def lco_logcosh(
    logits_of_actions: Tensor, old_logits_of_actions: Tensor, advantages: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """LCO-LCH: log cosh(z_θ(a) − z_t(a) − A/β), whose gradient tanh(·) never exceeds 1.

    Args:
        logits_of_actions, old_logits_of_actions, advantages, mask, beta: as for `lco_mse`.

    Returns:
        [B, T] unreduced, fp32 or better, 0 where the mask is False.

    Raises:
        ValueError: shapes differ or beta ≤ 0.

    arXiv:2603.00963, the authors' code, with the fixed target z_t + A/β. Computed as log(e^r + e^−r) − log 2, which
    does not overflow.
    """
    residual = _residual(logits_of_actions, old_logits_of_actions, advantages, mask, beta)
    return torch.logaddexp(residual, -residual) - math.log(2)


def _residual(logits: Tensor, old_logits: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> Tensor:
    """z_θ − z_t − A/β, 0 where the mask is False, which both losses turn into a loss of 0 without gradient."""
    require_positive(beta=beta)
    require_same_shape(logits_of_actions=logits, old_logits_of_actions=old_logits, mask=mask)
    require_same_shape(advantages=advantages, rows=mask[:, 0])
    target = at_least_fp32(old_logits.detach()) + (at_least_fp32(advantages.detach()) / beta).unsqueeze(1)
    return (at_least_fp32(logits) - target).masked_fill(~mask, 0.0)


def _kl_and_coefficient(log_p: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """KL(π*‖π_t) and c for log p < 0 and A/β = shift, in the precision given."""
    # log D where D is near 1 by log1p, which has no cancellation, and elsewhere by adding in log space, which has no
    # overflow. 0 · ∞ in `growth` is NaN, compares False and so takes the second way too.
    growth = log_p.exp() * torch.expm1(shift)
    apart = torch.logaddexp(torch.log(-torch.expm1(log_p)), log_p + shift)
    log_d = torch.where(growth.abs() < 0.5, torch.log1p(growth), apart)
    value = (log_p + shift - log_d).exp() * shift - log_d
    # |e^x − 1| = e^max(x, 0) (1 − e^−|x|): the factor that may overflow stays in the exponent with p and D.
    size = (log_p + shift.clamp(min=0) - log_d).exp() * -torch.expm1(-shift.abs())
    return value, shift.sign() * size
