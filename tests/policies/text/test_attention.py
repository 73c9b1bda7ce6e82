"""Three ways to the same shared-prefix attention: the definition, torch's SDPA, and the CPU's flash kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dar.batch import TokenGroups
from dar.policies.text.attention import dar_attention_forward, dar_mask, masked_attention, row_length, sdpa_attention
from dar.policies.text.packing import PackedGroups, pack


def layout(prompts: list[int], sizes: list[int], lengths: list[int]) -> PackedGroups:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.arange(mask.numel()).view(mask.shape)
    return pack(TokenGroups(tuple(tuple(range(n)) for n in prompts), tuple(sizes), ids, mask))


LAYOUTS = {
    "ragged": layout([7, 1, 12], [3, 1, 2], [9, 1, 4, 6, 2, 9]),
    "single tokens only": layout([4, 2], [2, 2], [1, 1, 1, 1]),
    "one row": layout([3], [1], [5]),
}


def flash(query: Tensor, key: Tensor, value: Tensor, packed: PackedGroups, *, scale: float) -> Tensor:
    states = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    output, _ = dar_attention_forward(None, *states, None, packed=packed, scaling=scale)  # pyright: ignore
    return output.squeeze(0)


def results(function: Callable[..., Tensor], packed: PackedGroups, **options: Any) -> list[Tensor]:
    """Output and gradients for fixed random states, 6 query heads on 2 key heads."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(packed.num_tokens, heads, 8, generator=generator).requires_grad_() for heads in (6, 2, 2)]
    output = function(*states, packed, scale=0.4, **options)
    upstream = torch.randn(output.shape, generator=generator)
    return [output, *torch.autograd.grad((output * upstream).sum(), states)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("function", [flash, sdpa_attention])
def test_kernels_agree_with_the_definition(function: Callable[..., Tensor], name: str) -> None:
    for found, expected in zip(results(function, LAYOUTS[name]), results(masked_attention, LAYOUTS[name]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_definition_sees_the_prompt_and_its_own_tokens_only() -> None:
    """With value = one-hot of the token, the output's support is what a token saw."""
    packed = layout([2, 1], [2, 1], [3, 2, 2])
    tokens = packed.num_tokens
    value = torch.eye(tokens).unsqueeze(1)
    seen = masked_attention(torch.zeros(tokens, 1, tokens), torch.zeros(tokens, 1, tokens), value, packed, scale=1.0)
    # Row: p p | y y | y || p | y  (a completion's last token is not fed).
    assert (seen.squeeze(1) > 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def window_of_two(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 2)


def test_window_counts_positions_not_places_in_the_row() -> None:
    packed = layout([2], [2], [3, 2])
    tokens = packed.num_tokens
    value = torch.eye(tokens).unsqueeze(1)
    zeros = torch.zeros(tokens, 1, tokens)
    seen = masked_attention(
        zeros, zeros, value, packed, scale=1.0, sight=lambda query, key: (key <= query) & (key > query - 2)
    )
    # The second completion's first token stands at position 2: it sees the prompt's last token and itself.
    assert (seen.squeeze(1) > 0).int().tolist()[4] == [0, 1, 0, 0, 1]


def test_soft_cap_without_a_layout_is_refused() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="packed or decoding only"):
        dar_attention_forward(None, states, states, states, None, softcap=5.0)


def test_attention_sinks_are_refused() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="sinks"):
        dar_attention_forward(None, states, states, states, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("asked", [{"use_vmap": True}, {"allow_is_causal_skip": False}])
def test_masks_that_depend_on_more_than_positions_are_refused(asked: dict[str, bool]) -> None:
    token = row_length.set(9)
    try:
        with pytest.raises(ValueError, match="more than positions"):
            dar_mask(**({"use_vmap": False, "allow_is_causal_skip": True, "mask_function": window_of_two} | asked))
    finally:
        row_length.reset(token)
