"""KL(π₀‖π_θ) of whole next-token distributions without ever holding [tokens, vocabulary] logits.

A chunk of positions at a time, both models' logits of a chunk computed again in the backward pass: what is kept
between the passes is hidden states and one number per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dar.policies.text.head import in_chunks, logits_of


@dataclass(frozen=True)
class HeldTokens:
    """Rows at whose tokens π_θ is held to π₀ over the whole vocabulary, and what π₀ says there.

    rows: [B] bool, at least one.
    states: [M, D] π₀'s hidden states before each token of **all** rows, row-major over the mask: from the same batch as
        π_θ's, so that they are the same bits while the weights are.
    ref_logits: π₀'s head, [m, D] → [m, V] fp32, temperature not applied.
    """

    rows: Tensor
    states: Tensor
    ref_logits: Callable[[Tensor], Tensor]


def forward_kl(
    model: Any, states: Tensor, ref_states: Tensor, ref_logits: Callable[[Tensor], Tensor], *, temperature: float
) -> Tensor:
    """KL(π₀‖π_θ) of the distributions that hidden states stand for, both at the same temperature.

        Σ_v π₀(v) [log π₀(v) − log π_θ(v)]

    Its gradient in π_θ's logits is π_θ − π₀, exactly 0 where the two are the same; π₀ gets none.

    Args:
        model: π_θ, a causal language model.
        states: [M, D] its hidden states.
        ref_states: [M, D'] π₀'s.
        ref_logits: π₀'s head, as in `HeldTokens`.
        temperature: divides the logits of both.

    Returns:
        [M] fp32 nats.
    """

    def chunk_kl(state: Tensor, ref_state: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logprobs = (ref_logits(ref_state) / temperature).log_softmax(-1)
        return _ForwardKL.apply(logits_of(model, state) / temperature, ref_logprobs)

    return in_chunks(chunk_kl, states, ref_states)


class _ForwardKL(torch.autograd.Function):
    """KL(p₀‖softmax z) per row, with the gradient softmax z − p₀ taken as that difference.

    Autograd would get (Σ p₀)·softmax z − p₀, which rounding keeps from 0 where z is π₀'s; an optimizer that divides by
    the gradient's size would make a whole step of what is left.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logprobs: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        ctx.save_for_backward(logprobs, ref_logprobs)
        return (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logprobs, ref_logprobs = ctx.saved_tensors
        return (logprobs.exp() - ref_logprobs.exp()) * grads[0].unsqueeze(-1), None
