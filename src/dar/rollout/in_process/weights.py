"""The weights as sampling wants them: in the compute precision, adapters merged, laid out for small batches.

Sampling reads every weight once per token, so it pays to convert them once per batch of rollouts instead of once per
token. Layers that read the same states (query, key and value; gate and up) become one product. The policy's own
weights are not touched; the converted copies live only while the context is open.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from dar.policies.text.frozen import is_linear

Linear = Callable[[Tensor], Tensor]

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names under which transformers' attention and MLP modules keep linear layers that read the same states."""


@contextmanager
def sampling_weights(
    model: nn.Module, dtype: torch.dtype, *, batch_size: int, in_place: bool = False
) -> Iterator[None]:
    """Inside, the model's linear layers compute with converted weights.

    Layers whose weights are in that precision already, where no layout is to be gained, are left as they are, and an
    adapter adds to what they compute.

    Args:
        model: a transformers or peft model.
        dtype: of the products; with fp32 nothing is converted, only adapters are merged and siblings joined.
        batch_size: rows the layout is chosen for.
        in_place: leave all layers as they are.
    """
    layers = {} if in_place else dict(_linear_layers(model))
    patched: list[nn.Module] = []
    try:
        for group in _groups(model, layers):
            bases = [layers[layer] for layer in group]
            on_cpu = bases[0].weight.device.type == "cpu" and _can_lay_out(dtype)
            if not on_cpu and all(base.weight.dtype == dtype for base in bases):
                continue
            joined = _linear(*_stacked([_merged(layer, layers[layer]) for layer in group]), dtype, batch_size)
            forwards = _shared(joined, [len(base.weight) for base in bases])
            for layer, forward in zip(group, forwards, strict=True):
                # An instance attribute hides the class's method until it is deleted again.
                setattr(layer, "forward", forward)  # noqa: B010 - pyright knows a method
                patched.append(layer)
        yield
    finally:
        for layer in patched:
            del layer.forward


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """Every linear layer (one with an adapter as a whole, not its parts) and the one inside that has its weight."""
    inside_adapters: set[int] = set()
    for module in model.modules():
        if id(module) in inside_adapters:
            continue
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            inside_adapters.update(map(id, module.modules()))
            base: Any = module.get_base_layer()
            # Where the base is anything else, the layer's own forward serves.
            if is_linear(base):
                yield module, base
        elif isinstance(module, nn.Linear) and is_linear(module):
            yield module, module


def _merged(layer: nn.Module, base: nn.Linear) -> nn.Linear:
    """The base of a layer, with the layer's adapter merged."""
    is_adapted = layer is not base and not getattr(layer, "disable_adapters", False)
    return merged_copy(layer).get_base_layer() if is_adapted else base


def merged_copy(layer: Any) -> Any:
    """The layer with its active adapters merged into its base by peft itself; unmerging would leave rounding behind."""
    merged = copy.deepcopy(layer).float()
    with torch.autocast(next(merged.parameters()).device.type, enabled=False):
        merged.merge()
    return merged


def _groups(model: nn.Module, layers: dict[nn.Module, nn.Linear]) -> list[list[nn.Module]]:
    """The layers, those that read the same states together."""
    groups: list[list[nn.Module]] = []
    for parent in model.modules():
        for names in _SIBLINGS:
            found = [getattr(parent, name, None) for name in names]
            members = [member for member in found if member is not None and member in layers]
            if len(members) == len(names):
                bases = [layers[member] for member in members]
                alike = len({(base.bias is None, base.in_features) for base in bases}) == 1
                groups += [members] if alike else [[member] for member in members]
    grouped = {layer for group in groups for layer in group}
    return groups + [[layer] for layer in layers if layer not in grouped]


def _stacked(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some layers as those of one."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None


def _shared(joined: Linear, sizes: list[int]) -> Iterator[Linear]:
    """One forward per sibling: the first to see new states computes the product for all."""
    if len(sizes) == 1:
        return iter((joined,))
    seen: list[Any] = [None, (), 0]

    def part(index: int) -> Linear:
        def forward(states: Tensor) -> Tensor:
            if states is not seen[0]:
                seen[:] = states, joined(states).split(sizes, dim=-1), len(sizes)
            found = seen[1][index]
            seen[2] -= 1
            if not seen[2]:
                # Kept until the next token, every layer's states of long prompts would be there at once.
                seen[:] = None, (), 0
            return found

        return forward

    return (part(index) for index in range(len(sizes)))


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, batch_size: int) -> Linear:
    cast = weight.detach().to(dtype)
    cast_bias = None if bias is None else bias.detach().to(dtype)
    if weight.device.type == "cpu" and _can_lay_out(dtype):
        # oneDNN's own layout saves it a reordering of every weight for every token. The operators are the
        # ones torch's compiler emits for frozen weights. In fp32, where a plain product is the BLAS library's,
        # it is as fast as that or faster, and most so on few rows.
        laid_out = torch.ops.mkldnn._reorder_linear_weight(cast, batch_size)

        def onednn(states: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(states.to(dtype), laid_out, cast_bias, "none", [], "")

        return onednn

    def plain(states: Tensor) -> Tensor:
        return functional.linear(states.to(dtype), cast, cast_bias)

    return plain


def _can_lay_out(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and has products of this precision on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
