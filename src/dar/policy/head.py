"""The language-model head: log-probabilities of given tokens without ever holding [tokens, vocabulary] logits.

A chunk of positions at a time: logits, log-softmax, the target's entry. The backward pass computes each chunk's logits
again, so what is kept between the passes is one number per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar.errors import ConfigError

CHUNK = 128
"""Positions per pass through the head: 128 × 49 152 logits are 25 MB in fp32, which still come from the heap instead of
freshly mapped pages (`dar.train.environment.settle_heap`)."""

BLOCK = 512
"""Positions whose probabilities are held at once in the backward pass: the [vocabulary, D] gradient is read and written
once per block."""


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
    if type(head) is nn.Linear and head.bias is None and cap is None:
        dtype = _compute_dtype(states)
        return _LinearHeadLogprobs.apply(states, head.weight, targets, scale / temperature, dtype)

    def chunk_logprobs(state: Tensor, target: Tensor) -> Tensor:
        logits = logits_of(model, state) / temperature
        return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    parts = []
    for state, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        part = checkpoint(chunk_logprobs, state, target, use_reentrant=False)
        assert part is not None
        parts.append(part)
    return torch.cat(parts)


def head_logits(model: Any, states: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """head(h)[target] / T in fp32, without the other logits.

    Args and result as `head_logprobs`.

    Raises:
        ConfigError: the architecture's head is more than a linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or _logit_cap(model) is not None:
        raise ConfigError(f"the head of {type(model).__name__} is not linear, so a single logit cannot be had cheaply")
    with torch.autocast(states.device.type, enabled=False):
        logits = (states.float() * head.weight[targets].float()).sum(-1)
        if head.bias is not None:
            logits = logits + head.bias[targets].float()
        return logits * (_logit_scale(model) / temperature)


class _LinearHeadLogprobs(torch.autograd.Function):
    """`head_logprobs` for a plain linear head z = s·W h, its gradient written out.

    With upstream gradient g per token, p = softmax(z) and y the target:

        ∂/∂h = s·g·( (1 − p_y)·W_y − Σ_{v≠y} p_v W_v )
        ∂/∂W_v = Σ_tokens s·g·( 1[v = y] − p_v )·h

    g scales [M, D] states rather than [M, V] probabilities, so no pass over the vocabulary is spent on it. The target's
    column is kept apart in fp32: in bf16, 1 − p_y of a confident token would be lost to rounding.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            cast = _in_dtype(weight, dtype)
            parts = [
                (_scaled(state.to(dtype) @ cast.T, scale).float())
                .log_softmax(-1)
                .gather(-1, target.unsqueeze(-1))
                .squeeze(-1)
                for state, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
            ]
        logprobs = torch.cat(parts)
        ctx.save_for_backward(states, weight, targets, logprobs)
        ctx.scale, ctx.dtype = scale, dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, weight, targets, logprobs = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        needs_states, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(states.device.type, enabled=False):
            cast = _in_dtype(weight, dtype)
            block = _room("probabilities", (BLOCK, len(weight)), dtype, weight.device)
            for start in range(0, len(states), BLOCK):
                rows = slice(start, start + BLOCK)
                state, target = states[rows].to(dtype), targets[rows].unsqueeze(-1)
                others = block[: len(state)]
                for part, into in zip(state.split(CHUNK), others.split(CHUNK), strict=True):
                    torch.softmax(_scaled(part @ cast.T, scale), -1, out=into)
                others.scatter_(1, target, 0.0)
                factor = (grads[0][rows] * scale).unsqueeze(-1)
                # 1 − p_y
                missing = -torch.expm1(logprobs[rows]).unsqueeze(-1)
                if grad_states is not None:
                    pull = missing * cast[targets[rows]].float() - (others @ cast).float()
                    grad_states[rows] = (factor * pull).to(states.dtype)
                if grad_weight is not None:
                    scaled = factor * states[rows].float()
                    product = _room("product", weight.shape, dtype, weight.device)
                    grad_weight -= torch.mm(others.T, scaled.to(dtype), out=product)
                    grad_weight.index_add_(0, targets[rows], missing * scaled)
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


_rooms: dict[str, Tensor] = {}


def _room(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Vocabulary-sized scratch memory that is kept between calls: mapping it anew cost more than filling it.

    What it holds is only good until the next call of either pass.
    """
    found = _rooms.get(name)
    if found is None or (found.shape, found.dtype, found.device) != (torch.Size(shape), dtype, device):
        found = _rooms[name] = torch.empty(shape, dtype=dtype, device=device)
    return found


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else _room("weight", weight.shape, dtype, weight.device).copy_(weight)


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


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def look_up_sparsely(model: Any) -> None:
    """Where the head shares the embedding's weight, lets the lookup's gradient hold only the rows that were looked up.

    The head's gradient covers the whole vocabulary anyway, and the rows are added into it: the sum is the same dense
    tensor, without a second one of that size for every micro-batch. Not under DDP, which would expect a sparse sum.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight:
        embedding.sparse = True


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compares this file's idea of the head with the model's own logits on a few tokens.

    Raises:
        ConfigError: they differ, so log-probabilities computed here would not be the model's.
    """
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    own = logits_of(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(own, expected, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} does something to its logits that dar does not know (largest difference "
            f"{(own - expected).abs().max():.3g}), so its log-probabilities would be wrong: please report it."
        )
