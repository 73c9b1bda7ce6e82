"""Decoding that departs from plain sampling: for looking at a model and for held-out evaluation, never for training.

A truncated or greedy sampler draws from another distribution than the one whose log-probabilities the update reads, so
its samples would not be those of π_t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dar.config.data import DecodingSpec
from dar.rollout.sampling import draw

_USUALLY_ENOUGH = 1024
"""Likeliest tokens among which a nucleus is looked for before a whole row is sorted."""


PLAIN = DecodingSpec()
"""Sampling from the model's own distribution: what training does."""


def constrained(decoding: DecodingSpec, logits: Tensor, positions: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """The logits with −∞ for every token that must not be drawn.

    Args:
        decoding: which those are.
        logits: [R, V], the temperature applied.
        positions: [R] tokens each row has already.
        eos_token_ids: every id that ends a completion.

    Returns:
        [R, V]; the very tensor where nothing is changed, so that plain sampling costs no pass over the vocabulary.
    """
    if decoding.min_new_tokens:
        early = (positions < decoding.min_new_tokens).to(logits.device).unsqueeze(1)
        without_eos = logits.index_fill(1, torch.tensor(eos_token_ids, device=logits.device), float("-inf"))
        logits = torch.where(early, without_eos, logits)
    return truncate(logits, top_k=1 if decoding.greedy else decoding.top_k, top_p=decoding.top_p)


def draw_constrained(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, decoding: DecodingSpec,
    eos_token_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token per row [R] and its log-probability under the distribution that it was drawn from, NaN where logits are
    not finite; the arguments are those of `draw` and `constrained`, before a temperature, the
    decoding's if it has one, divides the logits."""
    temperature = decoding.temperature or temperature
    if temperature != 1.0:
        logits = logits / temperature
    probabilities = torch.softmax(constrained(decoding, logits, positions, eos_token_ids), dim=-1)
    tokens = draw(probabilities, seeds)
    # A drawn token's probability is above 0, so its logarithm is as good as a log-softmax of all.
    return tokens, probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log()


def first_stop(decoding: DecodingSpec, text: str) -> int | None:
    """Where the first stop string begins in a text, or None."""
    return min((at for string in decoding.stop if (at := text.find(string)) >= 0), default=None)


def truncate(logits: Tensor, *, top_k: int | None, top_p: float) -> Tensor:
    """−∞ for every token outside the top-k, then outside the nucleus of what is left (Holtzman et al. 2020).

    Args:
        logits: [R, V].
        top_k: tokens that stay, ≥ 1; None = all.
        top_p: the nucleus is the smallest set of likeliest tokens whose share of the probability reaches it.

    Returns:
        [R, V]. Ties are broken by token id, the smaller one stays.
    """
    if top_k is None and top_p == 1:
        return logits
    count = min(top_k or _USUALLY_ENOUGH, logits.shape[1])
    likeliest = logits.topk(count).values
    sizes = torch.full_like(likeliest[:, :1], count, dtype=torch.int64)
    if top_p < 1:
        sizes = _nucleus_sizes(likeliest, logits if top_k is None else likeliest, top_p)
    wide = (sizes > count).squeeze(1)
    sizes = sizes.clamp(max=count)
    smallest = likeliest.gather(1, sizes - 1)
    if top_k is None and wide.any():
        whole = logits[wide].sort(descending=True).values
        sizes[wide] = _nucleus_sizes(whole, whole, top_p).clamp(max=whole.shape[1])
        smallest[wide] = whole.gather(1, sizes[wide] - 1)
    # The smallest value that stays and how many stay say it all, whatever order sorting gave to equal values.
    above, tied = logits > smallest, logits == smallest
    room = sizes - above.sum(1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(1) <= room))), float("-inf"))


def _nucleus_sizes(likeliest: Tensor, everything: Tensor, top_p: float) -> Tensor:
    """[R, 1] how many of the likeliest [R, M], in descending order, reach `top_p` of everything's probability.

    M + 1 where all of them do not.
    """
    best = likeliest[:, :1]
    total = (everything - best).exp().sum(1, keepdim=True, dtype=torch.float64)
    reached = (likeliest - best).exp().double().cumsum(1)
    return (reached < top_p * total).sum(1, keepdim=True) + 1
