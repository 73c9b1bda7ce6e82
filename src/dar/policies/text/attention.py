"""Attention over the packed layout: each prompt attends to itself, its completions to it and each to itself.

Registered with transformers under the name `dar`, so that every architecture with the attention backend runs it: a
forward pass with the keyword argument `packed` uses the layout, any other is transformers' own SDPA.

A completion's attention has two parts, keys of the prompt and keys of its own. Both are computed apart, the first for
all completions of a group as one matrix product against keys that exist once, and joined exactly through their
log-sum-exps:

    o = (e^{ℓ₁} o₁ + e^{ℓ₂} o₂) / (e^{ℓ₁} + e^{ℓ₂}).

In the backward pass each part's gradient is FlashAttention's, given the *joined* output and log-sum-exp (as in ring
attention, Liu et al. 2023, arXiv:2310.01889). That is the CPU's way. CUDA has one kernel for all (`flex.py`), other
devices torch's SDPA with a mask.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dar.policies.text.flex import BLOCK, SMALLEST_HEAD, flex, seen_by, serves
from dar.policies.text.packing import PackedGroups, Segments, Sight

NAME = "dar"
"""What the implementation is called in transformers' registry."""

row_length: ContextVar[int | None] = ContextVar("row_length", default=None)
"""Set while a model reads a flat row: no token of it has so high a position."""


class DecodeStore(Protocol):
    """Keys and values of a sampler's rows, as far as attention has to do with them."""

    def add_prompts(self, layer: int, keys: Tensor, values: Tensor, packed: PackedGroups) -> None:
        """Keeps what a layer computed of the prompts: [N, G, D] keys and values."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sight: Sight | None,
        softcap: float | None,
    ) -> Tensor:
        """[R, H, D] attention of each row's newest token (query [R, H, D]; key, value [R, G, D]) to its prompt and to
        its own tokens, this one included."""
        ...


def register() -> None:
    """Makes `attn_implementation="dar"` known to transformers."""
    # torch's compiler leaves it alone: its kernels are torch's own, and its loops follow the layout of each batch.
    AttentionInterface.register(NAME, torch.compiler.disable(dar_attention_forward))
    AttentionMaskInterface.register(NAME, dar_mask)


def dar_mask(**asked: Any) -> Any:
    """transformers' mask function: SDPA's mask, or for a flat row the rule (`Sight`) that a mask would be made from.

    A model asks once for each kind of layer, so windows, chunks, … are what it says, told to its attention or not.

    Raises:
        ValueError: what is seen depends on more than positions, or the model reads the mask itself.
    """
    longest = row_length.get()
    if longest is None:
        return sdpa_mask(**asked)
    if asked["use_vmap"] or not asked["allow_is_causal_skip"]:
        raise ValueError("its attention mask depends on more than positions")
    rule, size = asked["mask_function"], asked.get("local_size")
    if rule is causal_mask_function or (size is not None and size >= longest):
        return None
    zero = torch.zeros((), dtype=torch.int64, device=asked["device"])
    return partial(rule, zero, zero)


def dar_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    packed: PackedGroups | None = None,
    decoding: DecodeStore | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: SDPA, or with `packed` the shared-prefix attention.

    Args:
        query: [1, H, N, D] (packed).
        key, value: [1, G, N, D], G dividing H.
        attention_mask: `dar_mask`'s.
        packed: the layout of the N tokens.
        decoding: the sampler's cache: with `packed` it keeps the prompts' keys and values, without it the N tokens are
            the newest of its rows.
        scaling: of the scores, 1/√D by default.
        softcap: scores become c·tanh(score/c).
        s_aux: attention sinks; refused.

    Returns:
        ([1, N, H, D] output, None).
    """
    if s_aux is not None:
        raise ValueError("attention sinks are not implemented")
    if packed is None and decoding is None:
        if softcap is not None:
            raise ValueError("softcapped attention runs packed or decoding only")
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if query.device.type != "cpu":
        # Rotary factors are fp32, and leave the values behind in the compute precision.
        query, key = query.to(value.dtype), key.to(value.dtype)
    if packed is None:
        assert decoding is not None
        output = decoding.attend(
            module.layer_idx, query, key, value, scale=scale, sight=attention_mask, softcap=softcap
        )
        return output.unsqueeze(0), None
    if decoding is not None:
        decoding.add_prompts(module.layer_idx, key, value, packed)
    is_plain = attention_mask is None and softcap is None
    if is_plain and query.device.type == "cpu":
        output = _FlashSharedPrefix.apply(query, key, value, packed, scale)
    elif serves(query.device) and query.shape[-1] >= SMALLEST_HEAD:
        output = flex(query, key, value, packed, scale=scale, sight=attention_mask, softcap=softcap)
    elif query.device.type != "cpu" and softcap is None:
        output = sdpa_attention(query, key, value, packed, scale=scale, sight=attention_mask)
    else:
        output = masked_attention(query, key, value, packed, scale=scale, sight=attention_mask, softcap=softcap)
    return output.unsqueeze(0), None


def placed(packed: PackedGroups, device: torch.device) -> PackedGroups:
    """The layout on a device, as its attention wants it."""
    return (packed.aligned(BLOCK) if serves(device) else packed).to(device)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedGroups, *, scale: float, sight: Sight | None = None
) -> Tensor:
    """The same result through torch's SDPA and a mask of all tokens: where nothing better serves.

    Args and result as `masked_attention`. The time grows with the square of the row, and so do the mask's bytes.
    """
    states = (_on_heads(each, query.shape[1]).transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    mask = packed.kept(_dense_mask, sight)
    return functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=scale).squeeze(0).transpose(0, 1)


def _dense_mask(packed: PackedGroups, sight: Sight | None) -> Tensor:
    """[N, N] bool: who sees whom."""
    at = torch.arange(packed.num_tokens, device=packed.ids.device)
    return seen_by(packed, sight)(None, None, at.unsqueeze(1), at.unsqueeze(0))


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedGroups,
    *,
    scale: float,
    sight: Sight | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition: dense scores per group with an explicit mask; any rule of who sees whom, any soft cap.

    Memory grows with the square of a group's tokens.

    Args:
        query: [N, H, D].
        key, value: [N, G, D].
        packed: the layout.
        scale: of the scores.
        sight: which positions see which; None: all up to themselves.
        softcap: scores become c·tanh(score/c).

    Returns:
        [N, H, D].
    """
    flat = [_on_heads(states.float(), query.shape[1]) for states in (query, key, value)]
    output = torch.zeros_like(flat[0])
    # Autocast would round the scores.
    with torch.autocast(query.device.type, enabled=False):
        for index, (start, stop) in enumerate(packed.group_rows):
            spans = [packed.prompts.gather[index][packed.prompts.valid[index]]]
            spans += [packed.completions.gather[row][packed.completions.valid[row]] for row in range(start, stop)]
            tokens = torch.cat(spans)
            segment = torch.cat([torch.full_like(span, number) for number, span in enumerate(spans)])
            position = packed.positions[tokens]
            visible = (segment.unsqueeze(1) == segment.unsqueeze(0)) | (segment == 0).unsqueeze(0)
            visible &= (sight or torch.ge)(position.unsqueeze(1), position.unsqueeze(0))
            queries, keys, values = (states[tokens] for states in flat)
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            output = output.index_put((tokens,), torch.einsum("hqk,khd->qhd", weights, values))
    return output.to(query.dtype)


class _FlashSharedPrefix(torch.autograd.Function):
    """Shared-prefix attention from torch's FlashAttention kernels for the CPU.

    Everything is fp32 inside: on short segments the kernel's bf16 backward is several times slower than its fp32 one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: PackedGroups, scale: float) -> Tensor:
        flat = [_on_heads(states.float(), query.shape[1]) for states in (query, key, value)]
        prompt, rows = ([part.pad(each).transpose(1, 2) for each in flat] for part in packed.parts)
        prompt_out, prompt_lse = _flash(*prompt, causal=True, scale=scale)
        has_rows = packed.completions.gather.shape[1] > 0
        row_out, row_lse = _flash(*rows, causal=True, scale=scale) if has_rows else (rows[0], rows[0][..., 0])
        for start, stop, prefix_key, prefix_value in _prefixes(packed, prompt) if has_rows else ():
            queries = _stack(rows[0][start:stop])
            prefix_out, prefix_lse = _flash(queries, prefix_key, prefix_value, causal=False, scale=scale)
            prefix_out = _unstack(prefix_out, stop - start)
            prefix_lse = _unstack(prefix_lse.unsqueeze(-1), stop - start).squeeze(-1)
            joined = torch.logaddexp(row_lse[start:stop], prefix_lse)
            row_out[start:stop] *= (row_lse[start:stop] - joined).exp_().unsqueeze(-1)
            row_out[start:stop] += prefix_out * (prefix_lse - joined).exp_().unsqueeze(-1)
            row_lse[start:stop] = joined
        output = torch.empty(query.shape, dtype=torch.float32)
        _take(output, packed.prompts, prompt_out)
        _take(output, packed.completions, row_out)
        ctx.save_for_backward(query, key, value, output, prompt_lse, row_lse)
        ctx.packed, ctx.scale = packed, scale
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, prompt_lse, row_lse = ctx.saved_tensors
        packed, scale, grad = ctx.packed, ctx.scale, grads[0].float()
        flat = [_on_heads(states.float(), query.shape[1]) for states in (query, key, value)]
        prompt, rows = ([part.pad(each).transpose(1, 2) for each in flat] for part in packed.parts)
        prompt_out, row_out = (part.pad(output).transpose(1, 2) for part in packed.parts)
        # What stands in the padding is some other token's gradient: it must not flow.
        prompt_grad, row_grad = (
            (part.pad(grad) * part.valid[..., None, None]).transpose(1, 2) for part in packed.parts
        )
        grads_prompt = _flash_backward(prompt_grad, prompt, prompt_out, prompt_lse, causal=True, scale=scale)
        grads_rows = None
        if packed.completions.gather.shape[1] > 0:
            grads_rows = _flash_backward(row_grad, rows, row_out, row_lse, causal=True, scale=scale)
            for index, (start, stop, prefix_key, prefix_value) in enumerate(_prefixes(packed, prompt)):
                upstream, queries, out = (_stack(states[start:stop]) for states in (row_grad, rows[0], row_out))
                lse, states = _stack(row_lse[start:stop].unsqueeze(-1)).squeeze(-1), [queries, prefix_key, prefix_value]
                grad_query, grad_key, grad_value = _flash_backward(
                    upstream, states, out, lse, causal=False, scale=scale
                )
                grads_rows[0][start:stop] += _unstack(grad_query, stop - start)
                length = prefix_key.shape[2]
                grads_prompt[1][index, :, :length] += grad_key[0]
                grads_prompt[2][index, :, :length] += grad_value[0]
        results = []
        for which, states in enumerate((query, key, value)):
            whole = torch.empty(flat[which].shape, dtype=torch.float32)
            _take(whole, packed.prompts, grads_prompt[which])
            if grads_rows is not None:
                _take(whole, packed.completions, grads_rows[which])
            # Heads that share a key share its gradient.
            whole = whole.view(len(whole), states.shape[1], -1, whole.shape[-1]).sum(2)
            results.append(whole.to(states.dtype))
        return results[0], results[1], results[2], None, None


def _flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output [S, H, L, D], log-sum-exp [S, H, L])."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _flash_backward(
    grad: Tensor, states: list[Tensor], output: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, which `states` are."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *states, output, lse.contiguous(), 0.0, causal, scale=scale
    )


def _prefixes(packed: PackedGroups, prompt: list[Tensor]) -> Any:
    """(start row, stop row, keys [1, H, L, D], values) of each group's prompt."""
    lengths = packed.prompts.valid.sum(1).tolist()
    for index, ((start, stop), length) in enumerate(zip(packed.group_rows, lengths, strict=True)):
        yield start, stop, prompt[1][index : index + 1, :, :length], prompt[2][index : index + 1, :, :length]


def _stack(rows: Tensor) -> Tensor:
    """[K, H, T, D] → [1, H, K·T, D]: a group's queries as one."""
    return rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _unstack(stacked: Tensor, num_rows: int) -> Tensor:
    """[1, H, K·T, D] → [K, H, T, D]."""
    return stacked.squeeze(0).unflatten(1, (num_rows, -1)).transpose(0, 1)


def _on_heads(states: Tensor, heads: int) -> Tensor:
    """[N, G, D] → [N, H, D]: grouped keys repeated for the query heads that share them."""
    repeats = heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def _take(flat: Tensor, segments: Segments, padded: Tensor) -> None:
    """flat with the segments' tokens replaced by [S, H, L, D] values, in place."""
    flat[segments.gather[segments.valid]] = padded.transpose(1, 2)[segments.valid]
