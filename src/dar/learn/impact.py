"""How far each conflicting pair's gradient agrees with that of pairs under the new rules: TRACE's impact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dar.batch import TokenGroups
from dar.data.logged import LoggedGroup, token_groups
from dar.errors import NonFiniteError
from dar.objectives.preference import dpo
from dar.objectives.realignment import conflict_losses
from dar.ops import masked_sum
from dar.policies.protocol import Policy, Wants

Loss = Callable[[Tensor, Tensor], Tensor]
"""([N, 2] log π_θ, [N, 2] log π₀ of pairs) → a scalar."""


def gradient_agreement(
    policy: Policy,
    gold: Sequence[LoggedGroup],
    conflict: Sequence[LoggedGroup],
    is_inverted: Sequence[bool],
    *,
    beta: float,
    max_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """⟨g_J, ∇ℓ_i⟩ of every conflicting pair at the policy's present weights, one backward pass each.

        g_J = ∇ mean_gold[ −log σ(βΔ) ],   ℓ_i as in `conflict_losses`

    Args:
        policy: π_θ at θ_0, with its reference.
        gold: pairs under the new rules, each the chosen and the rejected completion.
        conflict: N pairs in their old order.
        is_inverted: N, True for INVERT, False for PUNISH.
        beta: KL weight.
        max_tokens: of one pass over gold pairs; a pair is not torn apart.
        advance: told of each conflicting pair that is done.

    Returns:
        N products over all trainable weights, in float64 between the tensors.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.

    arXiv:2511.02623, Algorithm 1.
    """

    def gold_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
        return dpo(logprobs[:, 0], logprobs[:, 1], reference[:, 0], reference[:, 1], beta=beta).sum() / len(gold)

    target = _gradient(policy, token_groups(gold), gold_loss, max_tokens)
    found: list[float] = []
    for index, (pair, inverted) in enumerate(zip(conflict, is_inverted, strict=True)):

        def pair_loss(logprobs: Tensor, reference: Tensor, inverted: bool = inverted) -> Tensor:
            mark = torch.tensor([inverted], device=logprobs.device)
            return conflict_losses(logprobs, reference, mark, beta=beta).sum()

        own = _gradient(policy, token_groups([pair]), pair_loss, max_tokens)
        product = sum(float(torch.dot(one.flatten(), other.flatten())) for one, other in zip(target, own, strict=True))
        if not abs(product) < float("inf"):
            raise NonFiniteError(
                f"impact weights: the gradient of conflicting pair {index} (row {pair.prompt.position} of the data) or "
                "that of the gold pairs is not finite. Try runtime.precision=fp32."
            )
        found.append(product)
        advance()
    return found


def _gradient(policy: Policy, groups: TokenGroups, loss: Loss, max_tokens: int) -> list[Tensor]:
    """The gradient of the sum of losses over groups of two completions, by trainable tensor; no weight is touched."""
    parameters = list(policy.trainable().values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    reference = masked_sum(policy.ref_logprobs(groups, max_tokens=max_tokens), groups.mask)
    with policy.training():
        for rows in groups.split(max_tokens):
            part = groups.select(rows)
            logprobs = policy.outputs(part, Wants(values=False)).logprobs
            sums = masked_sum(logprobs, part.mask.to(logprobs.device))
            pairs = loss(sums.reshape(-1, 2), reference[rows].to(sums.device).reshape(-1, 2))
            found = torch.autograd.grad(pairs, parameters, allow_unused=True)
            for into, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    into += gradient
    return total
