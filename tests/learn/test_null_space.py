"""Projection on a null space, Gram matrices from hooks, and weights that stay in the null space under Adam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.builders import assert_close, few
from torch import Tensor, nn

from dar.errors import CheckpointError, ConfigError
from dar.learn.null_space import NullSpaceConstraint, gram_matrices, null_space_projection

# Columns of K are the inputs of a layer with three features. They span the first two axes, so P = diag(0, 0, 1).
GOLDEN_K = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
GOLDEN_P = torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
# One input (1, 2): the null space is along (2, −1), P = [[4, −2], [−2, 1]] / 5.
SLANTED_K = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
SLANTED_P = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64) / 5
ROUNDING = 1e-12


def linear(out_features: int, in_features: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)


def train(layer: nn.Linear, after_step: Callable[[], None], *, num_steps: int = 5) -> None:
    """AdamW with weight decay on a loss whose gradient changes from step to step."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        inputs = torch.randn(4, layer.in_features, dtype=layer.weight.dtype, generator=generator)
        optimizer.zero_grad()
        (layer(inputs) - 1.0).square().sum().backward()
        optimizer.step()
        after_step()


# --- The projection --------------------------------------------------------------------------------------------------


def test_projection_of_the_golden_inputs():
    projection = null_space_projection(GOLDEN_K @ GOLDEN_K.T, relative_threshold=5e-5)
    assert_close(projection, GOLDEN_P, rtol=0, atol=ROUNDING)
    gradient = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], dtype=torch.float64)
    assert_close(gradient @ projection, [[0.0, 0.0, 2.0], [0.0, 0.0, 5.0]], rtol=0, atol=ROUNDING)
    assert_close(gradient @ projection @ GOLDEN_K, torch.zeros(2, 2), rtol=0, atol=ROUNDING)


def test_projection_of_one_slanted_input():
    projection = null_space_projection(SLANTED_K @ SLANTED_K.T, relative_threshold=5e-5)
    assert_close(projection, SLANTED_P, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
@pytest.mark.parametrize(
    ("relative_threshold", "kept"),
    [(2.0**-11, [0.0, 0.0, 1.0]), (2.0**-10, [0.0, 0.0, 1.0]), (2.0**-9, [0.0, 1.0, 1.0]), (2.0**-21, [0.0] * 3)],
)
def test_threshold_is_a_share_of_the_largest_eigenvalue_and_is_not_kept_itself(scale, relative_threshold, kept):
    gram = scale * torch.diag(torch.tensor([1.0, 2.0**-10, 2.0**-20], dtype=torch.float64))
    assert_close(
        null_space_projection(gram, relative_threshold=relative_threshold), torch.diag(torch.tensor(kept)), rtol=0
    )


@few
@given(seed=st.integers(0, 10_000), num_inputs=st.integers(1, 5))
def test_projection_has_the_properties_of_one(seed: int, num_inputs: int):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, num_inputs, dtype=torch.float64, generator=generator)
    projection = null_space_projection(inputs @ inputs.T, relative_threshold=1e-10)
    assert_close(projection @ projection, projection, rtol=0, atol=ROUNDING)
    assert_close(projection, projection.T, rtol=0, atol=ROUNDING)
    assert projection.trace().item() == pytest.approx(6 - num_inputs, rel=1e-12)
    # Neither the outputs on the inputs change, nor does a step cease to descend or grow.
    weights, gradient = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    projected = gradient @ projection
    assert_close((weights + projected) @ inputs, weights @ inputs, rtol=0, atol=1e-8)
    assert (gradient * projected).sum() >= 0
    assert projected.norm() <= gradient.norm()


def test_no_data_is_no_constraint_and_full_rank_is_a_frozen_layer():
    assert torch.equal(null_space_projection(torch.zeros(3, 3), relative_threshold=5e-5), torch.eye(3))
    assert torch.equal(null_space_projection(torch.eye(3), relative_threshold=5e-5), torch.zeros(3, 3))


def test_fp32_gram_is_decomposed_in_float64():
    # 2⁻²² I + (1 − 2⁻²²) 11ᵀ/8 is exact in fp32: λ = 1 along the ones, 2⁻²² = 2.384e-7 seven times at a right angle to
    # them. fp32's own decomposition scatters those from 1.7e-7 to 2.7e-7.
    gram = torch.full((8, 8), 2.0**-3 - 2.0**-25).fill_diagonal_(2.0**-3 - 2.0**-25 + 2.0**-22)
    projection = null_space_projection(gram, relative_threshold=2.4e-7)
    assert projection.dtype == torch.float32
    assert_close(projection, torch.eye(8, dtype=torch.float64) - 0.125, rtol=1e-6)
    assert not null_space_projection(gram, relative_threshold=2.37e-7).any()


@pytest.mark.parametrize("relative_threshold", [0.0, 1.0, -1e-3, math.nan])
def test_threshold_outside_its_range_is_refused(relative_threshold: float):
    with pytest.raises(ValueError, match=r"relative_threshold is a share of the largest eigenvalue in \(0, 1\)"):
        null_space_projection(torch.eye(2), relative_threshold=relative_threshold)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(2, 3), r"square matrix, got shape \[2, 3\]"),
        (torch.zeros(4), r"square matrix, got shape \[4\]"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "gram must be finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "gram must be symmetric: pass XᵀX"),
    ],
)
def test_other_than_gram_matrices_are_refused(gram: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        null_space_projection(gram, relative_threshold=5e-5)


# --- Gram matrices ---------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """`first` is used twice in a forward; `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = (nn.Linear(2, 2) for _ in range(3))
        self.norm = nn.LayerNorm(2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(self.first(inputs)))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_gram_adds_up_every_position_of_every_forward():
    model = TwoLayers()
    nn.init.eye_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    batches = [torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[3.0, 0.0]]), torch.tensor([1.0, 1.0])]

    def run() -> None:
        for batch in batches:
            assert not model(batch).requires_grad

    grams = gram_matrices(model, run, select=lambda name, layer: name in ("first", "second"))
    # Rows (1, 2), (0, 1), (3, 0), (1, 1): XᵀX = [[1 + 9 + 1, 2 + 1], [2 + 1, 4 + 1 + 1]], and `first` sees them twice.
    assert list(grams) == ["first", "second"]
    assert_close(grams["second"], [[11.0, 3.0], [3.0, 6.0]], rtol=0)
    assert_close(grams["first"], [[22.0, 6.0], [6.0, 12.0]], rtol=0)
    assert grams["first"].dtype == torch.float64
    assert not grams["first"].requires_grad
    assert hooks_of(model) == 0


def test_gram_is_float64_even_under_autocast():
    # 1 + 2⁻²⁰ has no bf16, and its square no fp32.
    layer, value = nn.Sequential(nn.Linear(1, 1)), 1 + 2.0**-20

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.tensor([[value]])).dtype == torch.bfloat16

    assert gram_matrices(layer, run, select=lambda name, module: True)["0"].item() == value**2


def test_hooks_are_removed_when_the_run_fails():
    model = TwoLayers()

    def run() -> None:
        model(torch.zeros(1, 2))
        assert hooks_of(model) == 3
        raise KeyError("the data ended")

    with pytest.raises(KeyError, match="the data ended"):
        gram_matrices(model, run, select=lambda name, layer: True)
    assert hooks_of(model) == 0


def test_layer_without_input_is_refused_by_name():
    model = TwoLayers()
    with pytest.raises(ValueError, match="no input reached spare;"):
        gram_matrices(model, lambda: model(torch.zeros(1, 2)), select=lambda name, layer: True)


def test_selection_of_nothing_is_refused():
    model = TwoLayers()
    with pytest.raises(ConfigError, match=r"no nn\.Linear of TwoLayers is selected"):
        gram_matrices(model, lambda: None, select=lambda name, layer: name == "norm")


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_adapters_are_refused(part: str):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["up_proj"], r=2))
    with pytest.raises(ConfigError, match=rf"up_proj\.{part}.* belongs to a LoRA adapter"):
        gram_matrices(model, lambda: None, select=lambda name, layer: part in name)
    name = f"mlp.up_proj.{part}"
    with pytest.raises(ConfigError, match=rf"{name} belongs to a LoRA adapter"):
        NullSpaceConstraint({name: linear(2, 2)}, {name: torch.eye(2)})


def test_trained_model_keeps_its_layers_outputs_on_general_data():
    # Fewer positions (7) than features (32 and 48), so every layer has a null space.
    model = make_model().double()
    general = torch.arange(100, 107).unsqueeze(0)
    grams = gram_matrices(model, lambda: model(general), select=lambda name, layer: ".mlp." in name)
    assert len(grams) == 6
    assert {name: len(gram) for name, gram in grams.items() if "layers.1" in name} == {
        "model.layers.1.mlp.gate_proj": 32,
        "model.layers.1.mlp.up_proj": 32,
        "model.layers.1.mlp.down_proj": 48,
    }
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in grams}
    projections = {name: null_space_projection(gram, relative_threshold=1e-12) for name, gram in grams.items()}
    constraint = NullSpaceConstraint(layers, projections)
    with torch.no_grad():
        before, elsewhere = model(general).logits, model(general - 50).logits
    parameters = [layer.weight for layer in layers.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(general - 50, labels=general - 50).loss.backward()
        optimizer.step()
        constraint.apply()
    with torch.no_grad():
        assert_close(model(general).logits, before, rtol=0, atol=1e-4)
        assert (model(general - 50).logits - elsewhere).abs().max() > 0.1


# --- The constraint --------------------------------------------------------------------------------------------------


def test_golden_step_keeps_only_the_last_column():
    layer = linear(2, 3)
    initial = layer.weight.detach().clone()
    constraint = NullSpaceConstraint({"a": layer}, {"a": GOLDEN_P})
    step = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], dtype=torch.float64)
    with torch.no_grad():
        layer.weight += step
    constraint.apply()
    kept = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    assert_close(layer.weight, initial + kept, rtol=1e-12)
    assert_close(layer.weight @ GOLDEN_K, initial @ GOLDEN_K, rtol=1e-12)
    # Projecting again changes nothing, and later steps add up from W₀.
    constraint.apply()
    assert_close(layer.weight, initial + kept, rtol=1e-12)
    with torch.no_grad():
        layer.weight += step
    constraint.apply()
    assert_close(layer.weight, initial + 2 * kept, rtol=1e-12)
    assert layer.weight.requires_grad


def test_projecting_the_gradient_before_adam_does_not_keep_the_weights_in_the_null_space():
    # Adam's first step is −lr · sign(g). g = (1, ½) projects to (.6, −.3) along (2, −1), and its sign is (1, −1): the
    # step (−lr, lr) is no longer at a right angle to the input (1, 2), and moves the output by −lr + 2 lr = lr.
    layer, gradient = linear(1, 2), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    initial = layer.weight.detach().clone()
    projected = gradient @ SLANTED_P
    assert_close(projected, [[0.6, -0.3]], rtol=1e-12)
    layer.weight.grad = projected
    torch.optim.Adam(layer.parameters(), lr=0.1, eps=1e-15).step()
    assert_close((layer.weight - initial) @ SLANTED_K, [[0.1]], rtol=1e-9)

    # After the step: ΔW = (−lr, −lr) P = −lr (2, −1)/5.
    layer = linear(1, 2)
    constraint = NullSpaceConstraint({"a": layer}, {"a": SLANTED_P})
    layer.weight.grad = gradient
    torch.optim.Adam(layer.parameters(), lr=0.1, eps=1e-15).step()
    constraint.apply()
    assert_close(layer.weight - initial, [[-0.04, 0.02]], rtol=1e-9)
    assert_close((layer.weight - initial) @ SLANTED_K, [[0.0]], rtol=0, atol=ROUNDING)


def test_identity_is_the_plain_optimizer_bit_by_bit():
    plain, constrained = linear(3, 4).float(), linear(3, 4).float()
    train(plain, lambda: None)
    train(constrained, NullSpaceConstraint({"a": constrained}, {"a": torch.eye(4, dtype=torch.float64)}).apply)
    assert torch.equal(constrained.weight, plain.weight)
    assert not torch.equal(plain.weight, linear(3, 4).float().weight)


def test_bf16_weights_are_projected_in_the_precision_of_the_projection():
    # W₀ = (1, 1) · 2⁻⁷ = ΔW, and ΔW P = (2/5, −1/5) · 2⁻⁷: one rounding, of the sum (1.4, .8) · 2⁻⁷.
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(layer.weight, 2.0**-7)
    constraint = NullSpaceConstraint({"a": layer}, {"a": SLANTED_P})
    with torch.no_grad():
        layer.weight += 2.0**-7
    constraint.apply()
    expected = (2.0**-7 * torch.tensor([[1.4, 0.8]], dtype=torch.float64)).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, expected)


def test_zero_freezes_the_weights_and_leaves_the_bias_free():
    layer = linear(3, 4, bias=True)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    constraint = NullSpaceConstraint({"a": layer}, {"a": torch.zeros(4, 4)})
    train(layer, constraint.apply)
    assert torch.equal(layer.weight, weight)
    assert not torch.isclose(layer.bias, bias).any()


def test_a_resumed_constraint_goes_on_exactly():
    layer = linear(2, 2)
    constraint = NullSpaceConstraint({"a": layer}, {"a": SLANTED_P})
    train(layer, constraint.apply, num_steps=2)
    # As a fresh process would: the weights of the checkpoint are in place before the constraint is made.
    resumed = linear(2, 2, seed=7)
    resumed.load_state_dict(layer.state_dict())
    state = {key: tensor.clone() for key, tensor in constraint.state_dict().items()}
    assert sorted(state) == ["a.initial", "a.projection"]
    again = NullSpaceConstraint({"a": resumed}, {"a": torch.eye(2, dtype=torch.float64)})
    again.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()  # what was loaded is a copy
    train(layer, constraint.apply)
    train(resumed, again.apply)
    assert torch.equal(resumed.weight, layer.weight)
    assert not torch.equal(linear(2, 2).weight, layer.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b.initial": torch.zeros(1)}, r"the saved state is of other layers: \['b.initial'\]"),
        ({"a.initial": torch.zeros(3, 2)}, r"a\.initial was saved as \[3, 2\], but is \[2, 2\] here"),
        ({"a.projection": torch.zeros(3, 3)}, r"a\.projection was saved as \[3, 3\], but is \[2, 2\] here"),
    ],
)
def test_state_of_another_model_is_refused(changes: dict[str, Tensor], message: str):
    constraint = NullSpaceConstraint({"a": linear(2, 2)}, {"a": SLANTED_P})
    with pytest.raises(CheckpointError, match=message):
        constraint.load_state_dict(constraint.state_dict() | changes)


def test_layers_that_cannot_be_constrained_are_refused():
    with pytest.raises(ConfigError, match=r"must have the same names; in one only: \['a', 'b'\]"):
        NullSpaceConstraint({"a": linear(2, 2)}, {"b": SLANTED_P})
    with pytest.raises(ValueError, match=r"the projection of a must be \[3, 3\], got \[2, 2\]"):
        NullSpaceConstraint({"a": linear(2, 3)}, {"a": SLANTED_P})
    frozen = linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="a is not trained"):
        NullSpaceConstraint({"a": frozen}, {"a": SLANTED_P})
