"""The head's own gradient against autograd through plain logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import nn

from dar.batch import TokenGroups
from dar.policies.text import head as head_module
from dar.policies.text.head import head_logprobs, look_up_sparsely
from dar.policies.text.logprobs import LogprobModel


def stub(weight: torch.Tensor, *, bias: bool = False, **settings: float) -> Any:
    """What the head functions read of a causal language model."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**settings))
    return SimpleNamespace(get_output_embeddings=lambda: layer, config=config, layer=layer)


def by_definition(model: Any, states: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None) -> Any:
    logits = model.layer(states) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (logits / 0.7).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(
    ("settings", "bias", "scale", "cap"),
    [
        ({}, False, 1.0, None),
        ({"logit_scale": 0.25}, False, 0.25, None),
        ({"logits_scaling": 8.0}, False, 0.125, None),
        ({"final_logit_softcapping": 2.0}, False, 1.0, 2.0),
        ({}, True, 1.0, None),
    ],
)
def test_values_and_gradients_are_autograds(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, float], bias: bool, scale: float, cap: float | None
) -> None:
    # Several chunks and tiles, the last ones short.
    for name, size in ("CHUNK", 4), ("POSITIONS", 4), ("ENTRIES", 5):
        monkeypatch.setattr(head_module, name, size)
    generator = torch.Generator().manual_seed(0)
    model = stub(torch.randn(13, 5, generator=generator), bias=bias, **settings)
    targets = torch.randint(0, 13, (10,), generator=generator)
    upstream = torch.randn(10, generator=generator)
    outcomes = []
    for own in (True, False):
        states = torch.randn(10, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logprobs = (
            head_logprobs(model, states, targets, temperature=0.7)
            if own
            else by_definition(model, states, targets, scale, cap)
        )
        gradients = torch.autograd.grad((logprobs * upstream).sum(), [states, *model.layer.parameters()])
        outcomes.append([logprobs, *gradients])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_token_has_no_logprob() -> None:
    model = stub(torch.ones(3, 2))
    states, targets = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert head_logprobs(model, states, targets, temperature=1.0).shape == (0,)


def test_confident_token_keeps_its_gradient_in_bf16() -> None:
    """p_y = 0.9999 rounds to 1 in bf16; 1 − p_y must survive."""
    weight = torch.zeros(2, 4)
    weight[0, 0] = 1.0
    model = stub(weight)
    states = torch.zeros(1, 4)
    states[0, 0] = 9.21
    states.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob = head_logprobs(model, states, torch.tensor([0]), temperature=1.0)
    (gradient,) = torch.autograd.grad(logprob.sum(), states)
    missing = 1 - logprob.exp().item()
    assert 0 < missing < 2e-4
    assert gradient[0, 0].item() == pytest.approx(missing, rel=1e-2)


def test_sparse_lookup_gives_the_same_dense_gradient():
    groups = TokenGroups(
        prompt_ids=((5, 6, 7), (8,)),
        group_sizes=(2, 1),
        completion_ids=torch.tensor([[9, 5, 9], [10, 11, 0], [5, 5, 5]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool),
    )
    gradients = []
    for sparse in (False, True):
        model = make_model()
        module = LogprobModel(model, temperature=1.0)
        if sparse:
            look_up_sparsely(model)
        # Twice: the second gradient is added to what the first left.
        for _ in range(2):
            module(groups).logprobs.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[1].layout == torch.strided
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_an_embedding_of_its_own_keeps_its_dense_gradient():
    # AdamW takes no sparse gradient, and an untied embedding has no head to add it to.
    model = make_model(tie_word_embeddings=False)
    look_up_sparsely(model)
    assert not model.get_input_embeddings().sparse
