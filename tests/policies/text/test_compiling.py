"""Compiled layers against the same layers as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model
from support.compilers import needs_compiler, no_compiler
from torch import Tensor, nn

from dar.batch import TokenGroups
from dar.config.model import LoraSpec
from dar.errors import ConfigError
from dar.policies.text.compiling import compiled_layers, require_compiler
from dar.policies.text.loading import add_lora
from dar.policies.text.logprobs import LogprobModel

CPU = torch.device("cpu")


def groups(length: int, *, num_prompts: int = 2) -> TokenGroups:
    """Prompts with two completions each, the last with one, of up to `length` tokens."""
    num_rows = 2 * num_prompts - 1
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    return TokenGroups(
        prompt_ids=((5, 6, 7), (8,), (9, 5))[:num_prompts],
        group_sizes=(2,) * (num_prompts - 1) + (1,),
        completion_ids=torch.randint(5, 260, (num_rows, length), generator=generator),
        mask=mask,
    )


def outcome(module: LogprobModel, length: int, *, num_prompts: int = 2) -> dict[str, Tensor]:
    """Log-probabilities and all gradients of one pass."""
    module.zero_grad()
    logprobs = module(groups(length, num_prompts=num_prompts)).logprobs
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs.detach(), **gradients}


def with_adapter() -> nn.Module:
    model = add_lora(make_model(), LoraSpec(rank=2))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.enable_input_require_grads()
    return model


def with_checkpointing() -> nn.Module:
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@needs_compiler
@pytest.mark.parametrize("make", [make_model, with_adapter, with_checkpointing])
def test_compiled_layers_have_the_same_logprobs_and_gradients(make: Any) -> None:
    module = LogprobModel(make(), temperature=0.7).train()
    for length in (6, 11, 4):
        plain = outcome(module, length)
        assert len(plain) > 5
        with compiled_layers(module):
            assert sum("forward" in vars(layer) for layer in module.modules()) == 2
            compiled = outcome(module, length)
        assert not any("forward" in vars(layer) for layer in module.modules())
        assert compiled.keys() == plain.keys()
        for name, expected in plain.items():
            # A small entry of a gradient is a difference of large ones, so the largest says what rounding may do. The
            # plain pass in fp64 is up to 1.7e-4 of it away from either.
            assert (compiled[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@needs_compiler
def test_other_lengths_layers_and_groups_compile_nothing_anew() -> None:
    """Layers share their code, and the attention, whose loops follow the groups, is none of it."""
    module = LogprobModel(make_model(num_hidden_layers=4), temperature=1.0).train()
    with compiled_layers(module):
        outcome(module, 6)
        with torch.compiler.set_stance("fail_on_recompile"):
            outcome(module, 9)
            outcome(module, 17)
            outcome(module, 8, num_prompts=3)


def test_a_machine_without_a_compiler_says_so() -> None:
    expected = r"runtime\.compile_layers: torch\.compile does not work here .* install g\+\+"
    with no_compiler(), pytest.raises(ConfigError, match=expected):
        require_compiler(CPU)
