"""Rotary factors that depend on the longest row of a batch: the same for every batch, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import engine_of
from support.handmade import plain_logprobs
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from dar.batch import Prompt, TokenGroups
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.loading import context_length
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy
from dar.policies.text.rotary import fixed_length
from dar.rollout.sampling import SamplingKey

LIMIT = 16
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.25, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS = {
    "longrope": lambda: LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=dict(LONGROPE)),
    "dynamic": lambda: LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=dict(DYNAMIC)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIGS[name]()).eval()


def rows(longest: int) -> TokenGroups:
    """A row of 9 tokens and one of `longest`."""
    ids = torch.arange(2, 2 + 2 * (longest - 6)).view(2, -1)
    mask = torch.arange(longest - 6) < torch.tensor([[5], [longest - 6]])
    return TokenGroups(((3, 4, 5, 6), (7, 8, 9, 10, 11, 12)), (1, 1), ids, mask)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_up_to_the_limit_are_the_same_in_every_batch(name: str, packed: bool) -> None:
    model, groups = build(name), rows(LIMIT)
    module = LogprobModel(model, temperature=1.0, packed=packed)
    assert module.is_packed == packed
    expected = plain_logprobs(model, groups, 1.0)
    torch.testing.assert_close(module(groups).logprobs, expected, rtol=1e-4, atol=2e-5)
    alone = module(groups.select(torch.tensor([True, False]))).logprobs
    torch.testing.assert_close(alone, expected[:1, :5], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_longer_rows_are_refused(name: str, packed: bool) -> None:
    module = LogprobModel(build(name), temperature=1.0, packed=packed)
    with pytest.raises(ConfigError, match="a row may have 17 tokens, but behind 16 the rotary factors"):
        module(rows(LIMIT + 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_agrees_up_to_the_limit_and_refuses_what_may_become_longer(name: str, tokenizer: Any) -> None:
    policy = Policy(build(name), tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=1.0,
                    with_reference=False)  # fmt: skip
    policy.eos_token_ids = (96,)
    prompts = [Prompt(i, "x", tuple(range(2, 2 + n)), {}) for i, n in enumerate((2, 6))]
    engine = engine_of(policy, max_tokens=1000)
    rollouts = engine.generate(prompts, 2, max_completion_length=LIMIT - 6, key=SamplingKey(0))
    expected = plain_logprobs(build(name), rollouts.groups, 1.0)
    torch.testing.assert_close(rollouts.logprobs, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ConfigError, match="a row may have 17 tokens"):
        engine.generate(prompts, 2, max_completion_length=LIMIT - 5, key=SamplingKey(0))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIGS["longrope"](), LIMIT),
        (CONFIGS["dynamic"](), LIMIT),
        (LlamaConfig(max_position_embeddings=128), None),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), None),
        (Gemma3TextConfig(rope_parameters={
            "full_attention": dict(LONGROPE), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }), LIMIT),
    ],
)  # fmt: skip
def test_limit_is_found_in_every_kind_of_layer_and_bounds_the_context(
    config: PretrainedConfig, expected: int | None
) -> None:
    assert fixed_length(config) == expected
    assert context_length(config) == (expected or config.max_position_embeddings)
