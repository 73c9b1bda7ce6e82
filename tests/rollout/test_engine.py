"""The sampler with adapters, and what it leaves behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import PeftModel
from support.engines import engine_of

from dar.batch import Prompt
from dar.config.model import LoraSpec
from dar.errors import RolloutError
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import opened_tag
from dar.rewards.verifiable import tag_format
from dar.rollout.in_process import weights
from dar.rollout.in_process.weights import sampling_weights
from dar.rollout.sampling import SamplingKey

FP32 = Precision(torch.device("cpu"), torch.float32)
PROMPTS = [Prompt(0, "x", (5, 6, 7), {}), Prompt(1, "x", (8,), {})]


def with_trained_adapter() -> PeftModel:
    model = add_lora(make_model(), LoraSpec(rank=2))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_merged_adapter_samples_what_the_trainer_scores(tokenizer: Any) -> None:
    policy = Policy(with_trained_adapter(), tokenizer, FP32, temperature=1.0)
    engine = engine_of(policy, max_tokens=1000)
    rollouts = engine.generate(PROMPTS, 3, max_completion_length=9, key=SamplingKey(0))
    logprobs = policy.logprobs(rollouts.groups, max_tokens=1000)
    torch.testing.assert_close(rollouts.logprobs, logprobs, rtol=1e-4, atol=1e-5)
    # The base with the adapter off is another distribution: the adapter was really in.
    assert (logprobs - policy.ref_logprobs(rollouts.groups, max_tokens=1000)).abs().max() > 0.1


@pytest.mark.parametrize("has_layout", [None, False])
def test_converted_weights_are_gone_after_sampling(monkeypatch: pytest.MonkeyPatch, has_layout: bool | None) -> None:
    if has_layout is not None:  # as on a processor without products in bf16; by default, what this one has
        monkeypatch.setattr(weights, "_can_lay_out", lambda _: has_layout)
    model = with_trained_adapter()
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with sampling_weights(model, torch.bfloat16, batch_size=4):
        inside = model(input_ids=ids).logits
    assert not torch.equal(inside, before)
    torch.testing.assert_close(inside.float(), before, rtol=0.1, atol=0.3)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_have_diverged_are_refused(tokenizer: Any, weight: float) -> None:
    model = make_model(tie_word_embeddings=False)
    engine = engine_of(Policy(model, tokenizer, FP32, temperature=1.0), max_tokens=1000)
    # One token's logits alone, which makes a whole softmax NaN.
    model.lm_head.weight.data[-1, 0] = weight
    with pytest.raises(RolloutError, match="the policy's logits are not finite"):
        engine.generate(PROMPTS, 3, max_completion_length=9, key=SamplingKey(0))


def test_tags_that_are_special_tokens_are_text_and_control_tokens_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    model = make_model(vocab_size=len(tokenizer))
    engine = engine_of(Policy(model, tokenizer, FP32, temperature=1.0), max_tokens=1000)
    said = "<|user|><think>a</think><pad><answer>b</answer><eos>"
    script = torch.tensor(tokenizer(said)["input_ids"])
    monkeypatch.setattr(engine, "_draw", lambda states, uniforms, at, _: (script[at], torch.zeros(len(at))))
    prompts = [Prompt(0, "x", tuple(tokenizer(text)["input_ids"]), {}) for text in ("<|assistant|>", "<eos>")]
    rollouts = engine.generate(prompts, 1, max_completion_length=20, key=SamplingKey(0))
    assert rollouts.texts == ("<think>a</think><answer>b</answer>",) * 2
    assert tag_format(["think", "answer"])(completions=rollouts.texts) == [1.0, 1.0]


def test_a_tag_that_the_prompt_opens_is_the_beginning_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    engine = engine_of(Policy(make_model(), tokenizer, FP32, temperature=1.0), max_tokens=1000)
    script = torch.tensor(tokenizer("a</think><answer>b</answer><eos>")["input_ids"])
    monkeypatch.setattr(engine, "_draw", lambda states, uniforms, at, _: (script[at], torch.zeros(len(at))))
    prompts = [Prompt(0, "x", tuple(tokenizer(text)["input_ids"]), {}) for text in ("<think>\n", "q", "<think> x")]
    rollouts = engine.generate(prompts, 2, max_completion_length=40, key=SamplingKey(0))
    said = "a</think><answer>b</answer>"
    assert rollouts.texts == (f"<think>\n{said}",) * 2 + (said,) * 4
    assert tag_format(["think", "answer"])(completions=rollouts.texts) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("user: q<think>", "a</think>b", "<think>"),
        ("user: q<think>", "a", ""),  # not closed: nothing that a reward could count
        ("user: q<think>", "<think>a</think>b", ""),  # opened by the completion itself
        ("user: q<think></think>\n", "a</think>", ""),
        ("user: q<bot>", "<b>a</b>", ""),  # a role's marker, not a tag of the turn
    ],
)
def test_opened_tag(prompt: str, completion: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    assert opened_tag(tokenizer, tokenizer(prompt)["input_ids"], completion) == expected
