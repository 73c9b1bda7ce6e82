"""Preference losses: DPO, IPO, SLiC and χPO on pairs of completions, NPO on single ones.

Every loss reads sequence log-probabilities, sums over the tokens of a completion, EOS included. Sums, because only then
exp(LP_θ − LP_0) is the ratio of the two policies; a mean over tokens is another objective. Online or offline makes no
difference here: online DPO is `dpo` on pairs that the policy has just sampled and a judge has put in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dar.ops import at_least_fp32, require_positive, require_same_shape

# e^89 leaves fp32, and e^−88 is already a subnormal number. The bounds are those of another implementation of χPO; the
# paper's own were not seen.
_MIN_LOG_RATIO, _MAX_LOG_RATIO = -88.0, 20.0


def log_ratio_margin(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> Tensor:
    """How much more than π₀ the policy prefers the chosen completion.

        Δ = [LP_θ(y_w) − LP_0(y_w)] − [LP_θ(y_l) − LP_0(y_l)]

    Args:
        chosen_logprobs: [N] nats, LP_θ(y_w), summed over the completion; the gradient flows here.
        rejected_logprobs: [N] nats, LP_θ(y_l), and here.
        ref_chosen_logprobs: [N] nats, LP_0(y_w), no gradient.
        ref_rejected_logprobs: [N] nats, LP_0(y_l), no gradient.

    Returns:
        [N] nats, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N].

    arXiv:2305.18290. β·Δ is the difference of DPO's implicit rewards.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return chosen - rejected


def dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DPO: −log σ(βΔ).

    Its gradient is −β σ(−βΔ) (∇LP_θ(y_w) − ∇LP_θ(y_l)): slope −β/2 in Δ at π_θ = π₀, and never 0. With preferences
    drawn from σ(r_w − r_l) the minimiser over all policies is ∝ π₀ e^{r/β}.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: as for `log_ratio_margin`.
        beta: KL weight, reward units per nat, > 0.

    Returns:
        [N] unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N], or beta ≤ 0.

    arXiv:2305.18290; online: arXiv:2402.04792.
    """
    require_positive(beta=beta)
    margin = log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return -logsigmoid(beta * margin)


def ipo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> Tensor:
    """IPO: (Δ − 1/(2β))², least where the margin is 1/(2β) nats.

    On sums over tokens, as in the paper; TRL's offline trainer averages over the tokens of each completion instead,
    its online trainer sums.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: as for `log_ratio_margin`.
        beta: 1/(2β) is the margin aimed at, in nats; > 0.

    Returns:
        [N] nats², unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N], or beta ≤ 0.

    arXiv:2310.12036.
    """
    require_positive(beta=beta)
    margin = log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return (margin - 1 / (2 * beta)).square()


def slic(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SLiC's hinge on the margin against π₀: max(0, 1 − βΔ), without gradient once βΔ ≥ 1.

    The form that TRL calls "hinge". SLiC-HF itself, whose text was not seen, is said to put the hinge on LP_θ without
    a reference and to add a likelihood term; that is not computed here.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: as for `log_ratio_margin`.
        beta: 1/β is the margin aimed at, in nats; > 0.

    Returns:
        [N] unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N], or beta ≤ 0.

    arXiv:2305.10425, in TRL's form.
    """
    require_positive(beta=beta)
    margin = log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return torch.relu(1 - beta * margin)


def chi_po(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    max_reward: float,
) -> Tensor:
    """χPO: DPO with the link φ(z) = z + log z in place of log z, for z = π_θ/π₀.

        L = −log σ( clip_{±2 R_max}( β [φ(z_w) − φ(z_l)] ) ),   φ(e^ℓ) = e^ℓ + ℓ,   ℓ = LP_θ − LP_0

    φ is the derivative of ½(z − 1)² + z log z, so the policy is held to π₀ by a mixture of χ² and KL, and the optimum
    is π₀ · φ⁻¹((r − Z)/β): the ratio grows like r/β, where DPO's grows like e^{r/β}. At π_θ = π₀ the gradient is twice
    DPO's (derived). The gradient is 0 where the margin is clipped.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: as for `log_ratio_margin`.
        beta: regularisation weight, reward units, > 0.
        max_reward: R_max > 0, reward units; `math.inf` turns the clip off.

    Returns:
        [N] unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N], beta ≤ 0 or max_reward ≤ 0.

    arXiv:2407.13399; formulas from a summary and another implementation, the identities derived. The exponent is
    clipped to [−88, 20], where the exponential then has no gradient; the linear ℓ is not clipped and keeps its own.
    """
    require_positive(beta=beta, max_reward=max_reward)
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    # Term by term, not φ(z_w) − φ(z_l): next to e^20 the linear ℓ is lost in fp32, even where the exponentials cancel.
    margin = (_bounded_exp(chosen) - _bounded_exp(rejected)) + (chosen - rejected)
    return -logsigmoid((beta * margin).clamp(-2 * max_reward, 2 * max_reward))


def npo(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float) -> Tensor:
    """NPO: −log σ(−β(LP_θ − LP_0)), which pushes a completion down without naming a better one.

    Its gradient is +β σ(β(LP_θ − LP_0)) ∇LP_θ: it fades as the completion becomes less likely than under π₀. In TRACE
    both completions of a pair to punish get this loss.

    Args:
        logprobs: [N] nats, LP_θ(y), summed over the completion; the gradient flows here.
        ref_logprobs: [N] nats, LP_0(y), no gradient.
        beta: KL weight, > 0.

    Returns:
        [N] unreduced, fp32 or better.

    Raises:
        ValueError: shapes differ or are not [N], or beta ≤ 0.

    As TRACE uses it, arXiv:2511.02623 and its official code.
    """
    require_positive(beta=beta)
    _require_sequences(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return -logsigmoid(-beta * _log_ratio(logprobs, ref_logprobs))


def _log_ratios(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    _require_sequences(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    return _log_ratio(chosen_logprobs, ref_chosen_logprobs), _log_ratio(rejected_logprobs, ref_rejected_logprobs)


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return at_least_fp32(logprobs) - at_least_fp32(ref_logprobs.detach())


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(_MIN_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _require_sequences(**logprobs: Tensor) -> None:
    require_same_shape(**logprobs)
    shape = next(iter(logprobs.values())).shape
    # Token log-probabilities [B, T] would give a loss of their own per token, and no error further on.
    if len(shape) != 1:
        raise ValueError(f"log-probabilities must be [N], one sum per completion, got {list(shape)}")
