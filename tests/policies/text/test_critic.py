"""The critic: where its values come from, what its loss trains, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.handmade import small_groups

from dar.policies.precision import Precision
from dar.policies.text.critic import make_critic
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy

Kind = Literal["head", "model"]
both_kinds = pytest.mark.parametrize("kind", ["head", "model"])
CPU = Precision(torch.device("cpu"), torch.float32)


def make_policy(kind: Kind, **changes: Any) -> Policy:
    model = make_model(**changes)
    return Policy(model, make_tokenizer(), CPU, temperature=1.0, critic=make_critic(model, kind))


def awaken(policy: Policy) -> None:
    """A head that says something: at the start it is 0."""
    critic = policy.module.critic
    assert critic is not None
    with torch.no_grad():
        critic.head.weight.copy_(torch.linspace(-1, 1, critic.head.in_features).unsqueeze(0))
        critic.head.bias.fill_(0.5)


@both_kinds
def test_values_are_zero_at_the_start(kind: Kind):
    groups = small_groups()
    values = make_policy(kind).values(groups, max_tokens=1000)
    assert values.shape == groups.mask.shape
    assert values.dtype == torch.float32
    assert (values == 0).all()


@both_kinds
def test_values_are_the_head_on_the_state_before_each_token(kind: Kind):
    """Against the plain model, one row at a time: V(s_t) reads the states before y_t, for y_0 the prompt's last one."""
    policy, groups = make_policy(kind), small_groups()
    awaken(policy)
    critic, plain = policy.module.critic, make_model()
    assert critic is not None
    values = policy.values(groups, max_tokens=1000)
    for row, prompt in enumerate(groups.row_prompts()):
        length = int(groups.lengths[row])
        ids = torch.tensor([[*prompt, *groups.completion_ids[row, :length].tolist()]])
        with torch.no_grad():
            states = plain.model(input_ids=ids).last_hidden_state[0]
            expected = (states @ critic.head.weight.T).squeeze(1) + critic.head.bias
        torch.testing.assert_close(
            values[row, :length], expected[len(prompt) - 1 : len(prompt) - 1 + length], rtol=1e-4, atol=1e-4
        )
        assert (values[row, length:] == 0).all()
    assert values[groups.mask].std() > 0.1


@both_kinds
def test_padded_and_packed_values_agree(kind: Kind):
    groups, found = small_groups(), []
    for packed in (True, False):
        model = make_model()
        module = LogprobModel(model, temperature=1.0, packed=packed, critic=make_critic(model, kind))
        assert module.is_packed == packed
        assert module.critic is not None
        torch.nn.init.ones_(module.critic.head.weight)
        found.append(module(groups, with_values=True).values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@both_kinds
def test_values_do_not_depend_on_micro_batches(kind: Kind):
    policy, groups = make_policy(kind), small_groups()
    awaken(policy)
    whole, parts = (policy.values(groups, max_tokens=size) for size in (1000, 1))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def value_gradients(kind: Kind) -> Policy:
    """A policy after the backward pass of Σ V alone."""
    policy = make_policy(kind)
    awaken(policy)
    outputs = policy.module(small_groups(), with_values=True)
    assert outputs.values is not None
    outputs.values.sum().backward()
    return policy


def test_head_sends_its_gradient_into_the_policys_layers():
    policy = value_gradients("head")
    trained = {name for name, p in policy.trainable().items() if p.grad is not None and p.grad.any()}
    # The language-model head is tied to the embedding, which the states are made of.
    assert trained == policy.trainable().keys()
    assert {name for name in trained if name.startswith("critic.")} == {"critic.head.weight", "critic.head.bias"}


def test_model_of_its_own_leaves_the_policy_alone():
    policy = value_gradients("model")
    assert all(p.grad is None for p in policy.model.parameters())
    critic = {name: p for name, p in policy.trainable().items() if name.startswith("critic.")}
    assert all(p.grad is not None and p.grad.any() for p in critic.values())
    own = {id(p) for p in policy.model.parameters()}
    assert not any(id(p) in own for p in critic.values())


def test_log_probabilities_do_not_train_the_critic():
    policy = make_policy("model")
    awaken(policy)
    policy.module(small_groups()).logprobs.sum().backward()
    critic = policy.module.critic
    assert critic is not None
    assert all(p.grad is None for p in critic.parameters())


def test_model_of_its_own_stays_when_the_policy_moves():
    policy, groups = make_policy("model"), small_groups()
    awaken(policy)
    before = policy.values(groups, max_tokens=1000)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(policy.values(groups, max_tokens=1000), before)


@both_kinds
def test_trainable_names_of_the_critic_have_a_prefix_of_their_own(kind: Kind):
    policy = make_policy(kind)
    plain = Policy(make_model(), make_tokenizer(), CPU, temperature=1.0)
    critic = policy.trainable().keys() - plain.trainable().keys()
    assert policy.trainable().keys() > plain.trainable().keys()
    assert all(name.startswith("critic.") for name in critic)
    trunk = {f"critic.trunk.{name}" for name in plain.trainable()} if kind == "model" else set()
    assert critic == {"critic.head.weight", "critic.head.bias"} | trunk
    # What the optimizer gets is what the module trains.
    assert {id(p) for p in policy.trainable().values()} == {
        id(p) for p in policy.module.parameters() if p.requires_grad
    }


def test_unused_language_model_head_of_the_critic_is_not_trained():
    names = make_policy("model", tie_word_embeddings=False).trainable().keys()
    assert "lm_head.weight" in names
    assert "critic.trunk.lm_head.weight" not in names
    assert "critic.trunk.model.embed_tokens.weight" in names


def test_critic_of_a_frozen_policy_is_trained_whole():
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    critic = make_critic(model, "model")
    assert all(p.requires_grad for p in critic.parameters())


@both_kinds
def test_saved_model_has_no_critic(tmp_path: Path, kind: Kind):
    policy = make_policy(kind)
    make_model().save_pretrained(tmp_path / "plain")
    policy.save(tmp_path / "model", card="card")
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain"))
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


def test_policy_without_a_critic_has_no_values():
    policy = Policy(make_model(), make_tokenizer(), CPU, temperature=1.0)
    assert policy.module(small_groups(), with_values=True).values is None
    with pytest.raises(ValueError, match="built without a critic"):
        policy.values(small_groups(), max_tokens=1000)
