"""Attention over the packed layout as one kernel, for GPUs: torch's FlexAttention with a mask of blocks.

A token sees two stretches of the flat row: the end of its own up to itself, and the end of its prompt. Three numbers a
query say it all, windows and chunks included; blocks of 128 × 128 tokens in which nothing is seen are never computed.
The mask is made once for all layers that have the same rule.

The kernel is compiled by the shape of the heads, the precision, whether gradients are wanted and whether scores are
bent, not by the layout: the row is filled up to whole blocks (`PackedGroups.aligned`), and its length is dynamic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._triton import has_triton

from dar.policies.text.packing import PackedGroups, Sight

BLOCK, SMALLEST_HEAD = 128, 16
"""Tokens of a block; Triton's products have no smaller sides."""


def serves(device: torch.device) -> bool:
    """Whether FlexAttention runs compiled, and trains, on this device: CUDA with Triton."""
    return device.type == "cuda" and has_triton()


def seen_by(packed: PackedGroups, sight: Sight | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """(batch, head, flat places of queries, of keys) -> whether those see these.

    Args:
        packed: the layout.
        sight: which positions are seen, a stretch that ends with the query's own; None: all of them.
    """
    first = torch.zeros_like(packed.positions)
    if sight is not None:
        at = torch.arange(packed.longest, device=packed.positions.device)
        first = sight(at.unsqueeze(1), at.unsqueeze(0)).int().argmax(1)[packed.positions]
    own = packed.starts + (first - packed.prefix_lengths).clamp(min=0)
    prefix, stop = packed.prefix_starts + first, packed.prefix_starts + packed.prefix_lengths

    def seen(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= own[query]) & (key <= query)) | ((key >= prefix[query]) & (key < stop[query]))

    return seen


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedGroups,
    *,
    scale: float,
    sight: Sight | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Shared-prefix attention of a row that was filled up to whole blocks (`packed.aligned(BLOCK)`).

    Args and result as `attention.masked_attention`; a rule as in `seen_by`.
    """
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    output = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _bent(softcap),
        block_mask=packed.kept(block_mask, sight),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


def block_mask(packed: PackedGroups, sight: Sight | None) -> BlockMask:
    """`seen_by` by blocks, ready for FlexAttention."""
    length, device = packed.num_tokens, packed.ids.device
    blocks = create_block_mask(seen_by(packed, sight), None, None, length, length, device=device)
    for part in blocks.as_tuple():
        if isinstance(part, Tensor):
            # Else the first layout's number of blocks would be compiled in, and the second compile anew.
            for dimension in range(2, part.ndim):
                torch._dynamo.maybe_mark_dynamic(part, dimension)
    return blocks


@cache
def _bent(softcap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@cache
def _compiled() -> Callable[..., Any]:
    # As a whole: where torch stopped compiling anew, scores of all tokens would be written out instead, unnoticed.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
