"""Whole steps on a device that is not the CPU: nothing mixes the two, nothing waits for it token by token.

The device is made of the CPU (`support.pretend`), so this says nothing of kernels. torch has to know of it before the
first backward pass of a process, so the tests run in one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer
from support.engines import engine_of
from support.pretend import pretend_device
from test_every_method import make_loop
from transformers import MistralConfig, MistralForCausalLM

import dar.assembly.device
from dar.batch import Prompt, Rollouts
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.model import LoraSpec
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text import attention, logprobs
from dar.policies.text.critic import make_critic
from dar.policies.text.loading import add_lora
from dar.policies.text.policy import Policy
from dar.rollout.in_process import engine
from dar.rollout.in_process.decode import PaddedDecoder
from dar.rollout.sampling import SamplingKey

CPU = torch.device("cpu")
IS_APART = "DAR_TEST_ON_A_DEVICE" in os.environ
apart = pytest.mark.skipif(not IS_APART, reason="runs in a process of its own, started by the first test")
PROMPTS = [Prompt(n, "x", ids, {}) for n, ids in enumerate([(5, 6, 7), (8,), (9, 10, 11, 12, 13), (7, 7)])]
Device = tuple[torch.device, Counter[str]]


@pytest.mark.skipif(IS_APART, reason="starts the others")
def test_everything_here_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"DAR_TEST_ON_A_DEVICE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    # Whether the packed pass is the padded one is tried with every number of the configuration: here it is known.
    monkeypatch.setattr(logprobs, "_packed_differs", lambda model: model.set_attn_implementation(attention.NAME))
    with pretend_device() as found:
        yield found


def windowed() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, initializer_range=0.3, eos_token_id=0)).eval()


def adapted() -> Any:
    model = add_lora(make_model(), LoraSpec(rank=2))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, Any] = {"plain": make_model, "windowed": windowed, "adapter": adapted}


def make_policy(model: Any, device: torch.device) -> Policy:
    critic = make_critic(model, "head")
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight)
    policy = Policy(model, make_tokenizer(), Precision(device, torch.float32), temperature=0.7, critic=critic)
    policy.eos_token_ids = tuple(range(0, 261, 9))  # so that rows end at different times
    return policy


def sampled(policy: Policy, length: int, *, max_tokens: int = 90, is_padded: bool = False) -> Rollouts:
    """By default with too little room for all prompts at once, so that rows come and go."""
    own = engine_of(policy, max_tokens=max_tokens)
    if is_padded:
        own.decoder = PaddedDecoder
    return own.generate(PROMPTS, 3, max_completion_length=length, key=SamplingKey(0))


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    assert torch.equal(found.groups.completion_ids, expected.groups.completion_ids)
    assert torch.equal(found.groups.mask, expected.groups.mask)
    assert (found.texts, found.finish_reasons) == (expected.texts, expected.finish_reasons)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


@apart
@pytest.mark.parametrize("name", MODELS)
def test_samples_passes_and_gradients_are_the_cpus(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "look_every", lambda where: 1 if where.type == "cpu" else 5)
    one, other = (make_policy(MODELS[name](), each) for each in (CPU, device[0]))
    rollouts = sampled(one, 12)
    assert len(set(rollouts.groups.lengths.tolist())) > 3
    assert_same(sampled(other, 12), rollouts)
    assert_same(sampled(other, 12, is_padded=True), rollouts)
    found: list[dict[str, Any]] = []
    for policy in one, other:
        with policy.training():
            outputs = policy.outputs(rollouts.groups, Wants(logits=True, held=rollouts.groups.rows_of(0, 1)))
        terms: list[Any] = [outputs.logprobs, outputs.values, outputs.logits, outputs.ref_kl]
        torch.stack(terms).sum().backward()
        grads: Any = {key: parameter.grad for key, parameter in policy.trainable().items()}
        found.append({key: grad.cpu() for key, grad in grads.items()})
        found[-1] |= {"logprobs": outputs.logprobs.detach().cpu(), "values": terms[1].detach().cpu()}
        found[-1]["reference"] = policy.ref_logprobs(rollouts.groups, max_tokens=20)
    for key, expected in found[0].items():
        assert (found[1][key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


@apart
def test_sampling_waits_when_it_looks_and_no_oftener(device: Device) -> None:
    where, waits = device
    policy = make_policy(make_model(), where)
    policy.eos_token_ids = (261,)  # which is never drawn, so that all rows stay
    counts = []
    for length in 24, 40:
        waits.clear()
        sampled(policy, length, max_tokens=10_000)
        counts.append(dict(waits))
    looks = 40 // engine.look_every(where) - 24 // engine.look_every(where)
    more = {key: count - counts[0].get(key, 0) for key, count in counts[1].items()}
    assert 0 < sum(more.values()) <= 2 * looks, more


@apart
def test_a_pass_and_its_gradient_wait_for_nothing(device: Device) -> None:
    where, waits = device
    policy = make_policy(windowed(), where)
    groups = sampled(policy, 12).groups
    waits.clear()
    with policy.training():
        outputs = policy.outputs(groups, Wants(logits=True))
    outputs.logprobs.sum().backward()
    assert not waits


@apart
@pytest.mark.parametrize("algorithm", ALGORITHM_SPECS)
def test_every_method_takes_the_cpus_step(
    algorithm: str, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_loop(tmp_path / "cpu", algorithm).step(1)
    precision = Precision(device[0], torch.float32)
    monkeypatch.setattr(dar.assembly.device, "resolve_precision", lambda _: precision)
    # It would move the module to what it takes for the device.
    monkeypatch.setattr(Accelerator, "prepare", lambda self, module: module)
    loop = make_loop(tmp_path / "device", algorithm)
    assert {each.device.type for each in loop.learner.policy.trained.parameters()} == {"pretend"}
    found = loop.step(1)
    for key in "loss", "grad_norm", "kl/ref", "entropy":
        if key in expected:
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
