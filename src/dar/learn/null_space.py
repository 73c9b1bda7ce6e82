"""Training that leaves what the model computes on general data alone: NSPO's projection of every optimizer step.

For a linear layer y = W x, a change ΔW with ΔW·x = 0 for the inputs x of a general data set changes nothing there. NSPO
keeps ΔW = W − W₀ in the null space of those inputs. arXiv:2512.11391; the form used here, after each step and on the
weights, is that of the authors' code.

    gram = gram_matrices(model, lambda: run_general_data(model), select=lambda name, layer: "mlp" in name)
    projections = {name: null_space_projection(matrix, relative_threshold=5e-5) for name, matrix in gram.items()}
    constraint = NullSpaceConstraint({name: model.get_submodule(name) for name in gram}, projections)
    ...
    optimizer.step()
    constraint.apply()

The step is projected and not the gradient: an optimizer that scales each coordinate (Adam, Adafactor) or decays weights
would turn a projected gradient out of the null space again. Biases are left free: a layer's output on general data is
kept but for its bias. LoRA is out of scope: there ΔW is a product of two matrices, and projecting either of them is
not this constraint. Weights must be whole, not shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dar.errors import CheckpointError, ConfigError

ADAPTER_PARTS = {"base_layer", "lora_A", "lora_B"}
"""What peft calls the linear layers inside a layer with an adapter."""


@torch.no_grad()
def null_space_projection(gram: Tensor, *, relative_threshold: float) -> Tensor:
    """P = Û Ûᵀ, the projection on the inputs a layer (nearly) never sees.

        XᵀX = U Λ Uᵀ,   Û = the eigenvectors with λ < relative_threshold · λ_max

    P² = P = Pᵀ. A Gram matrix of zeros gives the identity (no data, no constraint); if no λ is small enough, P is zero
    and the layer is frozen.

    Args:
        gram: [D, D] XᵀX of the layer's inputs X [n, D], float64 or float32.
        relative_threshold: in (0, 1). Below about 1e-12 (1e-5 if `gram` was added up in fp32) it is rounding that
            decides what is null.

    Returns:
        [D, D] in the dtype of `gram`; the eigenvectors are computed in float64.

    Raises:
        ValueError: not a finite symmetric matrix, or relative_threshold outside (0, 1).

    NSPO, arXiv:2512.11391. The relative threshold is that of the authors' code (called with 5e-5); the paper has an
    absolute one.
    """
    if not 0 < relative_threshold < 1:
        raise ValueError(f"relative_threshold is a share of the largest eigenvalue in (0, 1), got {relative_threshold}")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix, got shape {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError("gram must be finite: some input of the layer was not, or overflowed")
    if not gram.any():
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # eigh reads one triangle only, and would take any square matrix, X itself for one.
    if (gram - gram.T).abs().max() > 1e-5 * gram.abs().max():
        raise ValueError("gram must be symmetric: pass XᵀX, not the inputs X")
    eigenvalues, eigenvectors = torch.linalg.eigh(gram.double())
    null = eigenvectors[:, eigenvalues < relative_threshold * eigenvalues[-1]]
    return (null @ null.T).to(gram.dtype)


@torch.no_grad()
def gram_matrices(
    model: nn.Module, run: Callable[[], object], select: Callable[[str, nn.Linear], bool]
) -> dict[str, Tensor]:
    """XᵀX of the inputs of each selected linear layer, over everything `run` feeds the model.

    Every position of an input [..., D] is a row of X, padding too: feed unpadded rows. One float64 matrix of D² numbers
    per layer is kept, on the layer's device. Float64 throughout, since an eigenvalue 5e-5 of the largest is to be told
    from one that is not, and since autocast and TF32 leave float64 alone.

    Args:
        model: holds the layers; in eval mode if it has dropout.
        run: runs the general data through the model, without gradient; what it returns is not used.
        select: of each `nn.Linear`, by name and module: is it wanted?

    Returns:
        {name: [D, D] float64}, in the model's order.

    Raises:
        ConfigError: no layer is selected, or one that belongs to a LoRA adapter.
        ValueError: a selected layer got no input, so it would go unconstrained.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and select(name, module)
    }
    if not layers:
        raise ConfigError(f"null space: no nn.Linear of {type(model).__name__} is selected; change the selection")
    _refuse_adapters(layers)
    grams = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        for name, layer in layers.items()
    }
    num_rows = dict.fromkeys(layers, 0)

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        grams[name] += rows.T @ rows
        num_rows[name] += len(rows)

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, count in num_rows.items() if not count]
    if unseen:
        raise ValueError(f"null space: no input reached {', '.join(unseen)}; feed general data, or do not select them")
    return grams


class NullSpaceConstraint:
    """Keeps W − W₀ of linear layers in the null space of their general inputs: W ← W₀ + (W − W₀) P.

    W₀ is the weights as they are when this is made, before the first step. P = I leaves the optimizer as it is, P = 0
    freezes the layer. Only the weights are projected: the optimizer's own state stays.

    Args:
        layers: {name: layer}, trained weights.
        projections: {name: [D, D]} for the same names; a float64 one costs twice the memory and time of a float32 one.

    Raises:
        ConfigError: a layer belongs to a LoRA adapter or is frozen, or the names differ.
        ValueError: a projection does not fit its layer.

    NSPO, arXiv:2512.11391, as in the authors' code.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], projections: Mapping[str, Tensor]):
        _refuse_adapters(layers)
        if layers.keys() != projections.keys():
            lonely = sorted(layers.keys() ^ projections.keys())
            raise ConfigError(f"null space: layers and projections must have the same names; in one only: {lonely}")
        frozen = [name for name, layer in layers.items() if not layer.weight.requires_grad]
        if frozen:
            raise ConfigError(f"null space: {', '.join(frozen)} is not trained, so there is nothing to project")
        for name, layer in layers.items():
            expected = (layer.in_features, layer.in_features)
            got = projections[name].shape
            if got != expected:
                raise ValueError(f"null space: the projection of {name} must be {list(expected)}, got {list(got)}")
        self._layers = dict(layers)
        self._projections = {name: projections[name].to(layer.weight.device) for name, layer in layers.items()}
        self._initial = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Projects what all steps so far changed, in place; call it after each optimizer step."""
        for name, layer in self._layers.items():
            projection = self._projections[name]
            # In the finer of the two precisions from the difference on: W₀ itself is then never rounded, and fp32
            # weights come back bit by bit from P = I in float64.
            dtype = torch.promote_types(layer.weight.dtype, projection.dtype)
            initial = self._initial[name].to(dtype)
            layer.weight.copy_(initial + (layer.weight.to(dtype) - initial) @ projection.to(dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """P and W₀ of every layer, as `<name>.projection` and `<name>.initial`."""
        state: dict[str, Tensor] = {}
        for name in self._layers:
            state[f"{name}.projection"] = self._projections[name]
            state[f"{name}.initial"] = self._initial[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes P and W₀ from a saved state; the weights themselves are the model's to restore.

        Raises:
            CheckpointError: the state is of other layers, or of other shapes.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise CheckpointError(
                f"null space: the saved state is of other layers: {sorted(own.keys() ^ state.keys())}"
            )
        for key, tensor in own.items():
            if state[key].shape != tensor.shape:
                raise CheckpointError(
                    f"null space: {key} was saved as {list(state[key].shape)}, but is {list(tensor.shape)} here"
                )
        for name, layer in self._layers.items():
            self._projections[name] = state[f"{name}.projection"].to(layer.weight.device, copy=True)
            self._initial[name] = state[f"{name}.initial"].to(layer.weight.device, copy=True)


def _refuse_adapters(names: Iterable[str]) -> None:
    adapters = [name for name in names if ADAPTER_PARTS & set(name.split("."))]
    if adapters:
        raise ConfigError(
            f"null space: {adapters[0]} belongs to a LoRA adapter, which cannot be kept in one; train whole weights"
        )
