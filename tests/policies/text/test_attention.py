"""Ways to the same shared-prefix attention: the definition, torch's SDPA and FlexAttention, the CPU's flash kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from support.compilers import needs_compiler
from torch import Tensor
from torch.nn import functional

from dar.batch import TokenGroups
from dar.policies.text import flex as flex_module
from dar.policies.text.attention import dar_attention_forward, dar_mask, masked_attention, row_length, sdpa_attention
from dar.policies.text.flex import BLOCK, flex
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


def random_states(packed: PackedGroups) -> list[Tensor]:
    """Query, key and value: 6 query heads on 2 key heads."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(packed.num_tokens, heads, 16, generator=generator) for heads in (6, 2, 2)]


def results(function: Callable[..., Tensor], packed: PackedGroups, **options: Any) -> list[Tensor]:
    """Output and gradients for fixed random states."""
    states = [each.requires_grad_() for each in random_states(packed)]
    output = function(*states, packed, scale=0.4, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * upstream).sum(), states)]


def on_whole_blocks(query: Tensor, key: Tensor, value: Tensor, packed: PackedGroups, **options: Any) -> Tensor:
    """`flex` as a GPU takes it, the row filled up with what must not be seen."""
    filled = packed.aligned(BLOCK)
    missing = filled.num_tokens - packed.num_tokens
    states = [functional.pad(each, (0, 0, 0, 0, 0, missing), value=9.0) for each in (query, key, value)]
    return flex(*states, filled, **options)[: packed.num_tokens]  # pyright: ignore


def window_of_two(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 2)


def chunk_of_three(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key // 3 == query // 3)


def assert_agree(function: Callable[..., Tensor], packed: PackedGroups, **options: Any) -> None:
    found, expected = (results(each, packed, **options) for each in (function, masked_attention))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_agree_with_the_definition(name: str) -> None:
    assert_agree(flash, LAYOUTS[name])
    for sight in None, window_of_two, chunk_of_three:
        assert_agree(sdpa_attention, LAYOUTS[name], sight=sight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_agrees_with_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's operators say it: its kernels for the CPU have no backward pass, and it refuses to begin one there."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_module, "_compiled", lambda: torch_flex.flex_attention)
    for options in {}, {"sight": window_of_two}, {"sight": chunk_of_three, "softcap": 2.0}:
        assert_agree(on_whole_blocks, LAYOUTS[name], **options)


@needs_compiler
def test_flex_attention_compiles_once_for_all_layouts_and_rules() -> None:
    """With the code that torch's compiler makes for the CPU, and so without gradients."""
    ragged, others = LAYOUTS["ragged"], [*LAYOUTS.values(), layout([70, 30, 99], [2, 1, 2], [60, 33, 41, 5, 80])]
    with torch.no_grad():
        query, key, value = random_states(ragged)
        on_whole_blocks(query, key, value, ragged, scale=0.4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for packed in others:
                for sight in None, window_of_two, chunk_of_three:
                    options: Any = {"scale": 0.4, "sight": sight}
                    query, key, value = random_states(packed)
                    found = on_whole_blocks(query, key, value, packed, **options)
                    torch.testing.assert_close(found, masked_attention(query, key, value, packed, **options))


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


def test_window_counts_positions_not_places_in_the_row() -> None:
    packed = layout([2], [2], [3, 2])
    tokens = packed.num_tokens
    value = torch.eye(tokens).unsqueeze(1)
    zeros = torch.zeros(tokens, 1, tokens)
    seen = masked_attention(zeros, zeros, value, packed, scale=1.0, sight=window_of_two)
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
