"""The policy with its reference: a π₀ that follows the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

from dar.batch import TokenGroups
from dar.errors import NonFiniteError
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.policy import Policy

CPU = Precision(torch.device("cpu"), torch.float32)


def test_a_moving_reference_goes_the_given_share_of_the_way():
    policy = Policy(make_model(), make_tokenizer(), CPU, temperature=1.0, reference_moves=True)
    before = {name: tensor.clone() for name, tensor in policy.reference_state().items()}
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    policy.sync_reference(0.25)
    for name, tensor in policy.reference_state().items():
        torch.testing.assert_close(tensor, before[name] + 0.25)
    policy.sync_reference(1.0)
    own = dict(policy.model.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in policy.reference_state().items())


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path):
    policy = Policy(make_model(), make_tokenizer(), CPU, temperature=1.0, with_reference=False)
    policy.save(tmp_path / "model", card="before")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[3, 2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"the model is not saved to .*model: model.embed_tokens.weight is not"):
        policy.save(tmp_path / "model", card="after")
    assert (tmp_path / "model" / "README.md").read_text() == "before"


def test_a_gradient_computed_again_is_the_same_bytes():
    """The state at a prompt's end is read once for each completion: threads must not add these up in any order."""
    policy = Policy(make_model(hidden_size=512), make_tokenizer(), CPU, temperature=1.0, with_reference=False)
    mask = torch.ones(8, 60, dtype=torch.bool)
    groups = TokenGroups(((1, 2, 3),) * 2, (4, 4), torch.randint(5, (8, 60)), mask)
    parameters = list(policy.trainable().values())

    def gradient() -> list[torch.Tensor]:
        return list(torch.autograd.grad(policy.outputs(groups, Wants()).logprobs.sum(), parameters))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first = gradient()
        for _ in range(40):
            assert all(torch.equal(one, other) for one, other in zip(first, gradient()))
    finally:
        torch.set_num_threads(threads)
