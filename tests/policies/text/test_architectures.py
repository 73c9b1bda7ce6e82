"""The packed pass and the sampler against each architecture's own eager forward pass, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engines import engine_of
from support.handmade import plain_logprobs
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dar.batch import Prompt, TokenGroups
from dar.config.model import LoraSpec
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy
from dar.rollout.in_process.decode import PaddedDecoder, SharedPrefixDecoder
from dar.rollout.sampling import SamplingKey

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOWED: dict[str, Any] = GROUPED | {"head_dim": 8, "sliding_window": 5}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama_untied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "qwen2_windowed": lambda: Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "phimoe_windowed": lambda: PhimoeConfig(**GROUPED, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    "llama4_chunked": lambda: Llama4TextConfig(
        **GROUPED, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=5, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"], no_rope_layers=[1, 1, 1],
    ),
    "mistral_windowed": lambda: MistralConfig(**WINDOWED),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, use_parallel_residual=True),
    "gemma2": lambda: Gemma2Config(
        **WINDOWED, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**WINDOWED, query_pre_attn_scalar=8),
    "granite": lambda: GraniteConfig(**GROUPED, logits_scaling=2.0, attention_multiplier=0.2),
    "cohere2": lambda: Cohere2Config(**GROUPED, logit_scale=0.5, sliding_window=5),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=0, bos_token_id=1,
        initializer_range=0.25, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()


def ragged_groups() -> TokenGroups:
    """Prompts of 7, 1 and 12 tokens with 3, 1 and 2 completions of 1 to 9 tokens, some of them not the policy's."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 1, 4, 6, 2, 9])
    ids = torch.randint(2, 97, (6, 9), generator=generator)
    prompts = tuple(tuple(torch.randint(2, 97, (n,), generator=generator).tolist()) for n in (7, 1, 12))
    mask = torch.arange(9) < lengths.unsqueeze(1)
    mask[0, 3:6] = mask[2, 0] = mask[3, 4:] = False
    return TokenGroups(prompts, (3, 1, 2), ids, mask, lengths)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logprobs_and_gradients_are_the_plain_models(name: str) -> None:
    groups = ragged_groups()
    upstream = torch.linspace(-1, 2, groups.mask.numel()).view(groups.mask.shape)
    model = build(name)
    expected = plain_logprobs(model, groups, temperature=0.7)
    (expected * upstream).sum().backward()
    expected_grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    module = LogprobModel(model, temperature=0.7)
    assert module.is_packed
    logprobs = module(groups).logprobs
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=2e-5)
    (logprobs * upstream).sum().backward()
    for key, parameter in model.named_parameters():
        if key in expected_grads:
            assert parameter.grad is not None
            scale = expected_grads[key].abs().max().clamp(min=1e-3)
            torch.testing.assert_close(parameter.grad / scale, expected_grads[key] / scale, rtol=1e-3, atol=2e-4)


def gradients_of(model: Any, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum with a different factor for each token; the model's own are cleared."""
    upstream = torch.linspace(-1, 2, logprobs.numel()).view(logprobs.shape)
    (logprobs * upstream).sum().backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_packed_pass_through_an_adapter_is_the_plain_models() -> None:
    groups = ragged_groups()
    model = add_lora(build("llama"), LoraSpec(rank=3, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    expected = plain_logprobs(model, groups, temperature=1.0)
    expected_grads = gradients_of(model, expected)
    module = LogprobModel(model, temperature=1.0)
    assert module.is_packed
    logprobs = module(groups).logprobs
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=2e-5)
    gradients = gradients_of(model, logprobs)
    assert gradients.keys() == expected_grads.keys()
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_grads[name], rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        base = module(groups).logprobs
    torch.testing.assert_close(base, plain_logprobs(build("llama"), groups, temperature=1.0), rtol=1e-4, atol=2e-5)


def test_gradient_checkpointing_changes_no_bit_and_recomputes_the_layers() -> None:
    groups = ragged_groups()
    model = build("llama").train()
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    module = LogprobModel(model, temperature=1.0)
    calls.clear()
    logprobs = module(groups).logprobs
    gradients = gradients_of(model, logprobs)
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls.clear()
    again = module(groups).logprobs
    assert torch.equal(again, logprobs)
    recomputed = gradients_of(model, again)
    assert len(calls) == 2
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_shares_prefixes_and_reports_the_models_logprobs(name: str, tokenizer: Any) -> None:
    policy = Policy(build(name), tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=0.9,
                    with_reference=False)  # fmt: skip
    prompts = [Prompt(i, "x", tuple(range(2, 2 + n)), {}) for i, n in enumerate((7, 1, 12))]
    engine = engine_of(policy, max_tokens=40)
    assert isinstance(engine.decoder(policy.module), SharedPrefixDecoder)
    rollouts = engine.generate(prompts, 3, max_completion_length=14, key=SamplingKey(0))
    plain = build(name)
    expected = plain_logprobs(plain, rollouts.groups, temperature=0.9)
    torch.testing.assert_close(rollouts.logprobs, expected.detach(), rtol=1e-4, atol=2e-5)


def test_admitting_prompts_late_and_padding_change_no_token(tokenizer: Any) -> None:
    policy = Policy(build("llama"), tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=1.0,
                    with_reference=False)  # fmt: skip
    policy.eos_token_ids = tuple(range(8))
    prompts = [Prompt(i, "x", tuple(range(2, 2 + n)), {}) for i, n in enumerate((3, 9, 1, 6, 4))]
    results = []
    for max_tokens in (10_000, 60, 1):
        engine = engine_of(policy, max_tokens=max_tokens)
        results.append(engine.generate(prompts, 4, max_completion_length=20, key=SamplingKey(5)))
    padded = engine_of(policy, max_tokens=1)
    padded.decoder = PaddedDecoder
    results.append(padded.generate(prompts, 4, max_completion_length=20, key=SamplingKey(5)))
    assert {"eos", "length"} == set(results[0].finish_reasons)
    for other in results[1:]:
        assert torch.equal(results[0].groups.completion_ids, other.groups.completion_ids)
        assert results[0].finish_reasons == other.finish_reasons
        torch.testing.assert_close(results[0].logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


def test_recurrent_model_falls_back_to_the_padded_pass_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    ).eval()
    module = LogprobModel(model, temperature=1.0)
    assert not module.is_packed
    assert "cannot use the shared-prefix pass" in caplog.text
    groups = ragged_groups()
    torch.testing.assert_close(module(groups).logprobs, plain_logprobs(model, groups, 1.0), rtol=1e-3, atol=1e-4)
