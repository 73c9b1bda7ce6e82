"""Frozen weights in fewer bytes: kept as they were saved, a layer's raised to fp32 while it computes.

Every bf16 or fp16 number is an fp32 number, so the results are an fp32 copy's to the last bit. Other layers than the
two here (normalisation, experts kept as one tensor, those of an architecture's own) have fp32 weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.nn import functional

from dar.config.model import LoraSpec

log = logging.getLogger(__name__)

_PLAIN = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "r",
          "inference_mode", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "modules_to_save",
          "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"}  # fmt: skip
"""Fields of peft's configuration that change nothing in how an adapter computes."""


_IN_FP32_ALONE = {"glm_moe_dsa"}
"""Kinds of models whose log-probabilities a smaller base changes, though nothing in them fails (0.07 nats in a tiny
one, of all kinds in transformers' list)."""


class FrozenLinear(nn.Linear):
    """A linear layer whose weights may be in fewer bytes than its states."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _Raised.apply(input, self.weight, self.bias)


class FrozenEmbedding(nn.Embedding):
    """An embedding whose rows come out in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class _Raised(torch.autograd.Function):
    """A product with raised weights, raised again in the backward pass: autograd would keep every layer's fp32 copy."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


_FROZEN: dict[type[nn.Module], Any] = {nn.Linear: FrozenLinear, nn.Embedding: FrozenEmbedding}


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing more."""
    return type(module) in (nn.Linear, FrozenLinear)


def keep_frozen(model: Any, check: Callable[[Any], None]) -> None:
    """Layers that are not trained keep their weights' precision; all other weights, and all buffers, become fp32.

    So do all where a check of the transformers model raises: something reads a layer's weights past the layer.
    """
    kept = [] if model.config.model_type in _IN_FP32_ALONE else list(_layers(model))
    small = {id(parameter) for layer in kept for parameter in layer.parameters()}
    for each in (*model.parameters(), *model.buffers()):
        if id(each) not in small and each.is_floating_point():
            each.data = each.data.float()
    for layer in kept:
        _freeze(layer)
    try:
        check(model.get_base_model() if hasattr(model, "get_base_model") else model)
    except Exception as error:  # whatever an unknown architecture raises that reads a layer's weight itself
        log.warning("%s computes with fp32 weights alone (%s): its base is held in fp32", type(model).__name__, error)
        model.float()


def shrink(model: nn.Module) -> None:
    """Frozen layers whose weights are all bf16 (or all fp16) numbers, as of a model saved so, keep them as such."""
    for layer in _layers(model):
        for dtype in (torch.float16, torch.bfloat16):
            if all(torch.equal(parameter.to(dtype).to(parameter.dtype), parameter) for parameter in layer.parameters()):
                _freeze(layer.to(dtype))


def _freeze(layer: nn.Module) -> None:
    # Its class alone changes: whoever holds the layer, and its hooks, stay.
    layer.__class__ = _FROZEN.get(type(layer), type(layer))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The frozen linear layers and embeddings whose weights no other kind of layer has."""
    layers = [each for each in model.modules() if type(each) in (*_FROZEN, *_FROZEN.values())]
    known = set(map(id, layers))
    others = {id(parameter) for module in model.modules() if id(module) not in known
              for parameter in module.parameters(recurse=False)}  # fmt: skip
    for layer in layers:
        if not any(parameter.requires_grad or id(parameter) in others for parameter in layer.parameters()):
            yield layer


def asks_its_base(adapter: LoraSpec | PeftConfig | None) -> bool:
    """Whether an adapter adds to what its base layers compute, and reads none of their weights itself as DoRA does."""
    if type(adapter) is not LoraConfig:
        return isinstance(adapter, LoraSpec)
    usual, names = LoraConfig(), {field.name for field in dataclasses.fields(adapter)} - _PLAIN
    return all(getattr(adapter, name) == getattr(usual, name) for name in names)
