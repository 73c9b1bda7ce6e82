"""The weights as sampling wants them: in the compute precision, adapters merged, laid out for small batches.

Sampling reads every weight once per token, so it pays to convert them once per batch of rollouts instead of once per
token. The policy's own fp32 weights are not touched; the converted copies live only while the context is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

Linear = Callable[[Tensor], Tensor]


@contextmanager
def sampling_weights(model: nn.Module, dtype: torch.dtype, *, batch_size: int) -> Iterator[None]:
    """Inside, the model's linear layers compute with converted weights.

    Args:
        model: a transformers or peft model.
        dtype: of the products; with fp32 nothing is converted, only adapters are merged.
        batch_size: rows the layout is chosen for.
    """
    patched: list[nn.Module] = []
    try:
        for layer, weight, bias in list(_linear_layers(model)):
            # An instance attribute hides the class's method until it is deleted again.
            setattr(layer, "forward", _linear(weight, bias, dtype, batch_size))  # noqa: B010 - pyright knows a method
            patched.append(layer)
        yield
    finally:
        for layer in patched:
            del layer.forward


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, Tensor | None]]:
    """(layer, weight with its adapter merged, bias) of every linear layer."""
    inside_adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            inside_adapters.update(id(child) for child in module.modules() if child is not module)
            base = module.get_base_layer()
            if type(base) is nn.Linear:
                yield module, base.weight + _delta(module), base.bias
        elif type(module) is nn.Linear and id(module) not in inside_adapters:
            yield module, module.weight, module.bias


def _delta(layer: Any) -> Tensor | float:
    """What the active adapters add to the weight."""
    if layer.disable_adapters:
        return 0.0
    return sum((layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A), 0.0)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, batch_size: int) -> Linear:
    cast = weight.detach().to(dtype)
    cast_bias = None if bias is None else bias.detach().to(dtype)
    if dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN's own layout saves it a reordering of every weight for every token. The operators are the
        # ones torch's compiler emits for frozen weights.
        laid_out = torch.ops.mkldnn._reorder_linear_weight(cast, batch_size)

        def onednn(states: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(states.to(dtype), laid_out, cast_bias, "none", [], "")

        return onednn

    def plain(states: Tensor) -> Tensor:
        return functional.linear(states.to(dtype), cast, cast_bias)

    return plain
