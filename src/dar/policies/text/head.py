"""The language-model head: log-probabilities of given tokens without ever holding [tokens, vocabulary] logits.

A plain linear head is taken tile by tile: some positions against some of the vocabulary, small enough to stay in the
processor's cache from the product that makes it to the last pass that reads it. Any other head is taken some positions
at a time. The backward pass computes the logits again, so what is kept between the passes is a few numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar.errors import ConfigError
from dar.policies.text.frozen import is_linear

POSITIONS, ENTRIES = 1024, 2048
"""Positions and vocabulary entries of a tile: 8 MB of fp32 logits."""

CHUNK = 128
"""Positions per pass through a head that is not taken in tiles: 128 × 49 152 logits are 25 MB in fp32, which still come
from the heap instead of freshly mapped pages (`dar.record.environment.settle_heap`)."""

DEVICE_POSITIONS, DEVICE_ENTRIES, DEVICE_CHUNK = 4096, 16384, 512
"""The same on a GPU, where a small product leaves most of it idle: 268 MB of fp32 logits."""


def portions(device: torch.device) -> tuple[int, int, int]:
    """(positions, vocabulary entries) of a tile, and positions per pass through a head that is not taken in tiles."""
    return (POSITIONS, ENTRIES, CHUNK) if device.type == "cpu" else (DEVICE_POSITIONS, DEVICE_ENTRIES, DEVICE_CHUNK)


def head_logprobs(model: Any, states: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """log softmax(head(h) / T)[target], in fp32.

    Args:
        model: a causal language model.
        states: [M, D] hidden states.
        targets: [M] token ids.
        temperature: divides the logits.

    Returns:
        [M] fp32 nats.
    """
    head = model.get_output_embeddings()
    scale, cap = _logit_scale(model), _logit_cap(model)
    if is_linear(head) and head.bias is None and cap is None:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        return _LinearHeadLogprobs.apply(states, head.weight, targets, scale / temperature, dtype)

    def chunk_logprobs(state: Tensor, target: Tensor) -> Tensor:
        logits = logits_of(model, state) / temperature
        return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    return in_chunks(chunk_logprobs, states, targets)


def in_chunks(compute: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    """What is computed of each position of two tensors, some at a time, and once more in the backward pass."""
    size = portions(one.device)[2]
    chunks = zip(one.split(size), other.split(size), strict=True)
    return torch.cat([cast(Tensor, checkpoint(compute, *chunk, use_reentrant=False)) for chunk in chunks])


def head_logits(model: Any, states: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """head(h)[target] / T in fp32, without the other logits.

    Args and result as `head_logprobs`.

    Raises:
        ConfigError: the architecture's head is more than a linear layer.
    """
    head = model.get_output_embeddings()
    if not is_linear(head) or _logit_cap(model) is not None:
        raise ConfigError(f"the head of {type(model).__name__} is not linear, so a single logit cannot be had cheaply")
    with torch.autocast(states.device.type, enabled=False):
        # A token that stands twice: by indexing, threads would add up its gradient in any order.
        logits = (states.float() * head.weight.index_select(0, targets).float()).sum(-1)
        if head.bias is not None:
            logits = logits + head.bias.index_select(0, targets).float()
        return logits * (_logit_scale(model) / temperature)


class _LinearHeadLogprobs(torch.autograd.Function):
    """`head_logprobs` for a plain linear head z = s·W h, its gradient written out.

    Over the tiles i of the vocabulary, each with its own log-sum-exp ℓᵢ,

        log p_y = z_y − ℓ,   ℓ = log Σᵢ e^{ℓᵢ},   p_v = softmax_i(z)_v · e^{ℓᵢ − ℓ}.

    With upstream gradient g per token and y the target:

        ∂/∂h = s·g·( (1 − p_y)·W_y − Σ_{v≠y} p_v W_v )
        ∂/∂W_v = Σ_tokens s·g·( 1[v = y] − p_v )·h

    g, s and e^{ℓᵢ − ℓ} scale [M, D] states rather than a tile's probabilities, so no pass over the vocabulary is spent
    on them. The target's column is kept apart in fp32: in bf16, 1 − p_y of a confident token would be lost to rounding.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        positions, size, _ = portions(states.device)
        tiles = _slices(len(weight), size)
        sums = torch.empty(len(states), len(tiles), dtype=torch.float32, device=states.device)
        chosen = torch.empty(len(states), dtype=torch.float32, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for rows in _slices(len(states), positions):
                state, target, logit = states[rows].to(dtype), targets[rows], chosen[rows]
                for number, entries in enumerate(tiles):
                    logits = _scaled(state @ weight[entries].to(dtype).T, scale).float()
                    # log-softmax is one pass where log-sum-exp would be four.
                    sums[rows, number] = logits[:, 0] - logits.log_softmax(-1)[:, 0]
                    is_here, column = _targets_in(entries, target)
                    logit.copy_(torch.where(is_here, logits.gather(1, column), logit.unsqueeze(1)).squeeze(1))
        total = sums.logsumexp(-1)
        logprobs = chosen - total
        ctx.save_for_backward(states, weight, targets, logprobs, (sums - total.unsqueeze(-1)).exp_())
        ctx.scale, ctx.dtype = scale, dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, weight, targets, logprobs, shares = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        positions, size, _ = portions(states.device)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(states.device.type, enabled=False):
            for rows in _slices(len(states), positions):
                state, target = states[rows].to(dtype), targets[rows]
                factor = (grads[0][rows] * scale).unsqueeze(-1)
                # 1 − p_y
                missing = -torch.expm1(logprobs[rows]).unsqueeze(-1)
                scaled = factor * states[rows].float()
                pull = missing * weight[target].to(dtype).float()
                for number, entries in enumerate(_slices(len(weight), size)):
                    tile, share = weight[entries].to(dtype), shares[rows, number].unsqueeze(-1)
                    others = torch.softmax(_scaled(state @ tile.T, scale), -1)
                    is_here, column = _targets_in(entries, target)
                    others.scatter_(1, column, torch.where(is_here, 0.0, others.gather(1, column)))
                    if grad_states is not None:
                        pull -= share * (others @ tile).float()
                    if grad_weight is not None:
                        grad_weight[entries] -= others.T @ (share * scaled).to(dtype)
                if grad_states is not None:
                    grad_states[rows] = (factor * pull).to(states.dtype)
                if grad_weight is not None:
                    grad_weight.index_add_(0, target, missing * scaled)
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _targets_in(entries: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[m, 1] each: whether a position's target lies in a tile, and its column there (some column where it does not).

    Not the positions whose target does: for their number a device would have to be waited for.
    """
    columns = (targets - entries.start).unsqueeze(1)
    last = entries.stop - entries.start - 1
    return (columns >= 0) & (columns <= last), columns.clamp(0, last)


def logits_of(model: Any, states: Tensor) -> Tensor:
    """fp32 logits of hidden states, temperature not applied: the head and what the architecture does after it."""
    logits = _scaled(model.get_output_embeddings()(states).float(), _logit_scale(model))
    cap = _logit_cap(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _logit_scale(model: Any) -> float:
    """Cohere multiplies its logits by a constant, Granite divides."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def _logit_cap(model: Any) -> float | None:
    """Gemma bends its logits to ±cap."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    """Multiplied unless by 1: a pass over the vocabulary is worth an `if`."""
    return logits if scale == 1.0 else logits * scale


def look_up_sparsely(model: Any) -> None:
    """Where the head shares the embedding's weight, lets the lookup's gradient hold only the rows that were looked up.

    The head's gradient covers the whole vocabulary anyway, and the rows are added into it: the sum is the same dense
    tensor, without a second one of that size for every micro-batch. Not under DDP, which would expect a sparse sum.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight:
        embedding.sparse = True


@torch.no_grad()
def decoder_of(model: Any) -> Any:
    """What of a causal language model gives the states that its head reads."""
    decoder = model.get_decoder()
    # Where transformers' own look-up finds nothing, it returns the whole model.
    return model.model if decoder is model and hasattr(model, "model") else decoder


def check_head(model: Any) -> None:
    """Compares this file's idea of the head with the model's own logits on a few tokens.

    Raises:
        ConfigError: they differ, so log-probabilities computed here would not be the model's.
    """
    ids = torch.arange(5, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids[:, :4], use_cache=False).logits.float()
    try:
        # One more token, masked: padding must change nothing.
        states = decoder_of(model)(
            input_ids=ids, attention_mask=(torch.arange(5) < 4).long().to(ids).unsqueeze(0), use_cache=False
        ).last_hidden_state[:, :4]
        own = logits_of(model, states)
    except Exception as error:  # whatever an unknown architecture raises
        raise ConfigError(
            f"{type(model).__name__} is no decoder with a linear head behind it, so its log-probabilities cannot be "
            f"computed ({type(error).__name__}: {error}): take another architecture."
        ) from error
    if not torch.allclose(own, expected, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} does something to its logits that dar does not know (largest difference "
            f"{(own - expected).abs().max():.3g}), so its log-probabilities would be wrong: please report it."
        )
