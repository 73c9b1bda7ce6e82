"""KL of whole distributions, chunk by chunk, against its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from support.handmade import small_groups
from torch import Tensor
from torch.nn.functional import kl_div

from dar.batch import TokenGroups
from dar.policies.precision import Precision
from dar.policies.text import head as head_module
from dar.policies.text.divergence import HeldTokens, forward_kl
from dar.policies.text.head import logits_of
from dar.policies.text.logprobs import LogprobModel, unwrapped
from dar.policies.text.policy import Policy

TEMPERATURE = 0.7
HELD = torch.tensor([True, False, True])


def make_policy(model: Any, precision: torch.dtype = torch.float32) -> Policy:
    return Policy(model, make_tokenizer(), Precision(torch.device("cpu"), precision), temperature=TEMPERATURE)


def moved(model: Any) -> Any:
    """The same model a little further on."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def by_definition(model: Any, reference: Any, groups: TokenGroups) -> Tensor:
    """[B, T] from the plain models' whole logits, one row at a time."""
    found = torch.zeros(groups.mask.shape)
    for row, prompt in enumerate(groups.row_prompts()):
        length = int(groups.lengths[row])
        ids = torch.tensor([[*prompt, *groups.completion_ids[row, :length].tolist()]])
        after = slice(len(prompt) - 1, len(prompt) - 1 + length)
        own = (model(input_ids=ids).logits[0, after] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            target = (reference(input_ids=ids).logits[0, after] / TEMPERATURE).log_softmax(-1)
        found = found.index_put(
            (torch.full((length,), row), torch.arange(length)),
            kl_div(own, target, reduction="none", log_target=True).sum(-1),
        )
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}],
    ids=["tied", "untied"],
)
def test_values_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], packed: bool
):
    monkeypatch.setattr(head_module, "CHUNK", 4)  # 9 held tokens: three chunks, the last one short
    groups, reference = small_groups(), make_model(**changes)
    plain = moved(make_model(**changes))
    expected = by_definition(plain, reference, groups) * HELD.unsqueeze(1)
    upstream = torch.randn(groups.mask.shape, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad((expected * upstream).sum(), list(plain.parameters()))

    module = LogprobModel(moved(make_model(**changes)), temperature=TEMPERATURE, packed=packed)
    assert module.is_packed == packed
    frozen = LogprobModel(reference, temperature=TEMPERATURE, packed=packed)
    with torch.no_grad():
        states, _ = frozen.states(reference, groups)
    held = HeldTokens(HELD, states, lambda states: logits_of(reference, states))
    found = module(groups, held=held).ref_kl
    assert found is not None
    assert expected[HELD].sum() > 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[~(groups.mask & HELD.unsqueeze(1))] == 0).all()
    gradients = torch.autograd.grad((found * upstream).sum(), list(module.model.parameters()))
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert all(parameter.grad is None for parameter in reference.parameters())


def lora_model() -> Any:
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))


def lora_head_model() -> Any:
    """An adapter on the head too: π₀'s head is then the base's."""
    model = make_model(tie_word_embeddings=False)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("make", [make_model, lora_model, lora_head_model])
def test_policy_is_held_to_what_it_was(make: Any):
    policy, groups = make_policy(make()), small_groups()
    base = make_model(tie_word_embeddings=make is not lora_head_model)
    moved(policy.model)
    outputs = policy.module(groups, held=policy.held_tokens(groups, HELD))
    plain = copy.deepcopy(policy.model)
    unwrapped(plain).set_attn_implementation("eager")
    expected = by_definition(plain, base, groups) * HELD.unsqueeze(1)
    torch.testing.assert_close(outputs.ref_kl, expected, rtol=1e-5, atol=1e-5)
    outputs.ref_kl.sum().backward()
    # What the reference's passes switched off for a while is trained as before.
    assert all(parameter.grad is not None for parameter in policy.trainable().values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_model, lora_model])
def test_kl_and_its_gradient_are_exactly_zero_before_the_first_step(make: Any, precision: torch.dtype):
    """Rounding that is left would be made a whole step by an optimizer that divides by the gradient's size."""
    policy, groups = make_policy(make(), precision), small_groups()
    held = policy.held_tokens(groups, HELD)
    policy.module.train()
    with policy.precision.compute():
        kl = policy.module(groups, held=held).ref_kl
    assert kl is not None
    assert (kl == 0).all()
    kl.sum().backward()
    gradients = [parameter.grad for parameter in policy.trainable().values() if parameter.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_both_get_the_temperature_and_only_the_policy_a_gradient():
    # Two tokens: KL(p₀‖p) for p = σ(z/T), z = 1 and p₀ = σ(z₀/T), z₀ = −1, T = ½; slope (p − p₀)/T.
    class Stub:
        config = make_model().config

        def __init__(self, value: float) -> None:
            self.head = torch.nn.Linear(1, 2, bias=False)
            torch.nn.init.zeros_(self.head.weight)
            self.head.weight.data[0, 0] = value

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.head

    policy, reference = Stub(1.0), Stub(-1.0)
    state = torch.ones(1, 1)
    found = forward_kl(policy, state, state, lambda states: logits_of(reference, states), temperature=0.5)
    p, p0 = torch.sigmoid(torch.tensor(2.0)), torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(found, (p0 * (p0 / p).log() + (1 - p0) * ((1 - p0) / (1 - p)).log()).reshape(1))
    found.sum().backward()
    assert policy.head.weight.grad is not None
    torch.testing.assert_close(policy.head.weight.grad[0, 0], (p - p0) / 0.5)
    assert reference.head.weight.grad is None


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch):
    """Whatever the number of rows, the saved tensors between the passes are states and never [.., vocabulary]."""
    monkeypatch.setattr(head_module, "CHUNK", 4)
    model, sizes = make_model(), []
    state = torch.randn(64, 32, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kl = forward_kl(model, state, state.detach(), lambda states: logits_of(model, states), temperature=1.0)
    # What a chunk saves inside is dropped until the backward pass computes it again.
    assert all(261 not in size for size in sizes)
    kl.sum().backward()
    assert state.grad is not None


def test_a_policy_without_a_reference_cannot_be_held_to_it():
    policy = Policy(
        make_model(), make_tokenizer(), Precision(torch.device("cpu"), torch.float32), temperature=1.0,
        with_reference=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="built without a reference"):
        policy.held_tokens(small_groups(), HELD)
