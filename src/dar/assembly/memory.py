"""Bytes that a step takes, phase by phase, from the shapes of a model and of its batch.

Counted as torch allocates them, of a decoder of gated MLPs in the packed pass; other architectures are taken for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dar.policies.text.head import ENTRIES, POSITIONS


@dataclass(frozen=True)
class ModelShape:
    """Numbers of weights, and widths of what flows between layers.

    total, linear, head: of all, of the decoder's linear layers, of the head (which may be the embedding's).
    features: Σ (inputs + outputs) of the linear layers.
    hidden, queries, keys, inner: width of the residual stream, of all query heads, of all key heads, of the MLP.
    """

    total: int
    linear: int
    head: int
    features: int
    vocabulary: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int


def shape_of(config: Any) -> ModelShape:
    """The shape of a causal language model with this configuration; no weight is made."""
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        total=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(layer.weight.numel() for layer in linear),
        head=head.weight.numel(),
        features=sum(layer.in_features + layer.out_features for layer in linear),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=heads * size,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


@dataclass(frozen=True)
class StepShape:
    """What of a step and its recipe takes memory.

    tokens, last: of a micro-batch and of the last, every prompt once; microbatches: of an update.
    rows, length, prompts: sampled at once, tokens of each, their prompts' tokens.
    trained, base_bytes: parameters that are trained (in fp32), and bytes of one that is not.
    rank: of adapters; 0 trains all weights. moments: the optimizer's bytes per trained parameter.
    compute: bytes of a number in matrix products. reference: bytes of a reference of its own.
    trunks: decoders that an update goes through: two with a critic's own.
    shards: ranks of which each holds a part of every weight, gradient and moment (`runtime.sharding: full`).
    """

    tokens: int
    last: int
    microbatches: int
    rows: int
    length: int
    prompts: int
    trained: int
    rank: int = 0
    base_bytes: int = 4
    moments: int = 8
    compute: int = 4
    reference: int = 0
    trunks: int = 1
    is_checkpointed: bool = False
    is_in_place: bool = False
    shards: int = 1


def memory_of(model: ModelShape, step: StepShape) -> dict[str, float]:
    """Most bytes at once in each phase, under the name of its time in metrics.jsonl; `weights`: what no phase frees."""
    weights = (4 * step.trained + (step.base_bytes * model.total if step.rank else 0) + step.reference) / step.shards
    # Of weights in fewer bytes than the states have, one layer's are raised while it computes.
    raised = 4 * model.hidden * model.inner if step.rank and step.base_bytes < step.compute else 0
    # Of sharded ones whole at once: those of no layer, one layer's, and twice the next's as they arrive.
    whole = model.total - model.linear + 3 * model.linear / model.layers if step.shards > 1 else 0
    held, base = weights + step.moments * step.trained / step.shards + raised, step.base_bytes if step.rank else 4
    return {
        "weights": weights,
        "rollout": held + _rollout(model, step),
        "reference": held + whole * (step.reference / model.total or base) + _forward(model, step),
        "update": held + whole * base + _update(model, step),
    }


def cache_bytes(model: ModelShape, tokens: float, itemsize: int = 4) -> float:
    """Of the keys and values of so many tokens, in all layers."""
    return 2 * itemsize * model.keys * model.layers * tokens


def _rollout(model: ModelShape, step: StepShape) -> float:
    copies = 0 if step.is_in_place else step.compute * (model.linear + model.head)
    cache = cache_bytes(model, step.prompts + step.rows * step.length)
    # A layer's cache is made anew while the old one is there; logits, their softmax and the draw's rows.
    return copies + cache * (1 + 1 / model.layers) + 3 * 4 * step.rows * model.vocabulary


def _forward(model: ModelShape, step: StepShape) -> float:
    """One layer's states of a micro-batch, at the widest place, or the head."""
    wide = max(2 * model.hidden + 3 * model.inner, 3 * model.hidden + 8 * model.queries)
    return 4 * step.tokens * wide


def _update(model: ModelShape, step: StepShape) -> float:
    # Of sharded weights a layer's gradient is whole until it has been added up over ranks.
    gradients = 4 * step.trained * (1 / step.shards + (1 / model.layers if step.shards > 1 else 0))
    later = gradients + _passes(model, step, step.tokens if step.microbatches > 2 else step.last)
    return max(_passes(model, step, step.tokens), gradients, later if step.microbatches > 1 else 0)


def _passes(model: ModelShape, step: StepShape, tokens: int) -> float:
    """Forward and backward pass of a micro-batch, its own gradients left out but the head's."""
    layer = tokens * _kept(model, step)
    cast = 2 * model.linear if step.compute == 2 and (not step.rank or step.base_bytes != 2) else 0
    if step.shards > 1 and step.is_checkpointed:
        cast /= model.layers  # made again for the backward pass, layer by layer
    kept = step.trunks * model.layers * (4 * tokens * model.hidden if step.is_checkpointed else layer) + cast
    tile = 3 * step.compute * min(ENTRIES, model.vocabulary) + 4 * 4 * model.hidden
    head = 4 * (0 if step.rank else model.head) + min(POSITIONS, tokens) * tile
    # The backward pass of the last layer's attention: keys and values for every query head, all by segments, gradients.
    attention = 4 * tokens * (12 * model.queries + 2 * model.hidden)
    inside = attention + (layer if step.is_checkpointed else -step.compute * 4 * tokens * model.inner)
    return kept + max(head, inside)


def _kept(model: ModelShape, step: StepShape) -> float:
    """Bytes that a layer keeps of a token for its backward pass."""
    c = step.compute
    # In fp32 the residuals, normalised ones too where norms are trained, and attention's query, key and output.
    fp32 = (2 if step.rank else 4) * model.hidden + 2 * model.queries + model.keys
    # Products' inputs: layers that read the same states share them in fp32, and cast them each for itself in bf16.
    inputs = 2 * model.hidden if c == 4 else 5 * model.hidden + model.queries
    return 4 * fp32 + c * (inputs + model.keys + 4 * model.inner) + 4 * step.rank * 7
