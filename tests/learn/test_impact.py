"""Agreement of gradients with those of gold pairs, against autograd through plain log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from dar.batch import Prompt
from dar.data.logged import LoggedCompletion, LoggedGroup
from dar.errors import NonFiniteError
from dar.learn.impact import gradient_agreement
from dar.policies.precision import Precision
from dar.policies.text.head import look_up_sparsely
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy

BETA = 0.3
CPU = Precision(torch.device("cpu"), torch.float32)


def pair(position: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> LoggedGroup:
    completions = tuple(LoggedCompletion(tuple(ids), "", 0.0, "eos") for ids in (chosen, rejected))
    return LoggedGroup(Prompt(position, "", tuple(prompt), {}), completions)


GOLD = [pair(0, [10, 11], [70, 71, 0], [80, 0]), pair(1, [12], [72, 0], [81, 82, 83, 0]), pair(2, [9], [7], [8, 0])]
CONFLICT = [pair(0, [13, 14], [90, 0], [91, 92, 0]), pair(1, [10, 11], [80, 0], [70, 71, 0]), pair(2, [15], [20], [21])]
IS_INVERTED = [True, True, False]


def plain_logprob(model: Any, group: LoggedGroup, which: int) -> Tensor:
    prompt, completion = group.prompt.token_ids, group.completions[which].token_ids
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).sum()


def by_definition(model: Any, reference: Any) -> list[float]:
    """Loss by loss, one row at a time."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def ratio(group: LoggedGroup, which: int) -> Tensor:
        return plain_logprob(model, group, which) - plain_logprob(reference, group, which).detach()

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    gold = sum(-logsigmoid(BETA * (ratio(group, 0) - ratio(group, 1))) for group in GOLD) / len(GOLD)
    assert isinstance(gold, Tensor)
    target, found = gradient(gold), []
    for group, inverted in zip(CONFLICT, IS_INVERTED, strict=True):
        if inverted:
            loss = -logsigmoid(BETA * (ratio(group, 1) - ratio(group, 0)))
        else:
            loss = -logsigmoid(-BETA * ratio(group, 0)) - logsigmoid(-BETA * ratio(group, 1))
        found.append(float(target @ gradient(loss)))
    return found


def lora_model() -> Any:
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("make", [make_model, lora_model])
def test_agreement_is_the_inner_product_of_gradients(make: Any, max_tokens: int):
    torch.manual_seed(0)
    policy = Policy(make(), make_tokenizer(), CPU, temperature=1.0, reference=make_model(seed=1))
    look_up_sparsely(unwrapped(policy.model))
    before = {name: parameter.clone() for name, parameter in policy.trainable().items()}
    done: list[int] = []
    found = gradient_agreement(
        policy, GOLD, CONFLICT, IS_INVERTED, beta=BETA, max_tokens=max_tokens, advance=lambda: done.append(1)
    )
    torch.manual_seed(0)
    plain, reference = make(), make_model(seed=1)
    unwrapped(plain).set_attn_implementation("eager")
    assert found == pytest.approx(by_definition(plain, reference), rel=1e-3)
    # The second pair is the first gold one, to be turned round: after that it is the same pair.
    assert found[1] > 0
    assert len(done) == 3
    for name, parameter in policy.trainable().items():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not policy.module.training


def test_a_gradient_that_is_not_finite_is_an_error():
    policy = Policy(make_model(), make_tokenizer(), CPU, temperature=1.0)
    with torch.no_grad():
        next(iter(policy.trainable().values()))[90] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the gradient of conflicting pair 0 \(row 0 of the data\)"):
        gradient_agreement(policy, GOLD, CONFLICT, IS_INVERTED, beta=BETA, max_tokens=4096)
