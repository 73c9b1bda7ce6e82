"""A base that stays in the precision it was saved in computes what its fp32 copy computes, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig
from support.architectures import tiny
from support.engines import engine_of
from test_every_architecture import long_groups

from dar.assembly.adapter import adapted
from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.batch import Prompt, TokenGroups
from dar.config.model import LoraSpec, ModelSpec
from dar.config.recipe import load_recipe
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.frozen import FrozenLinear, asks_its_base, keep_frozen
from dar.policies.text.head import check_head
from dar.policies.text.loading import load_model
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy
from dar.rollout.in_process.weights import sampling_weights
from dar.rollout.sampling import SamplingKey

FP32, BF16 = (Precision(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
GROUPS = TokenGroups(((5, 6, 7), (8,)), (2, 2), torch.arange(36).view(4, 9), torch.ones(4, 9, dtype=torch.bool))


def trained_adapter(**changes: Any) -> Any:
    """A tiny bf16 model with an adapter that does something."""
    model = make_model(attention_bias=True, **changes).bfloat16().requires_grad_(False)
    keep_frozen(model, check_head)
    model = adapted(model, LoraSpec(rank=2), seed=0)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def policy_of(model: Any, precision: Precision = FP32) -> Policy:
    return Policy(model, make_tokenizer(), precision, temperature=1.0)


@pytest.mark.parametrize("precision", [FP32, BF16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_base_is_its_fp32_copy_to_the_last_bit(precision: Precision, tied: bool):
    small = policy_of(trained_adapter(tie_word_embeddings=tied), precision)
    raised = policy_of(copy.deepcopy(small.model).float(), precision)
    dtypes = {p.dtype for p in small.model.parameters() if not p.requires_grad and p.ndim == 2}
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in small.trainable().values()} == {torch.float32}
    found = [policy.outputs(GROUPS, Wants()).logprobs for policy in (small, raised)]
    assert torch.equal(*found)
    grads = [torch.autograd.grad(logprobs.sum(), list(policy.trainable().values()))
             for policy, logprobs in zip((small, raised), found)]  # fmt: skip
    assert all(map(torch.equal, *grads))
    references = [policy.ref_logprobs(GROUPS, max_tokens=99) for policy in (small, raised)]
    assert torch.equal(*references)
    assert (references[0] - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("in_place", [False, True])
def test_copies_to_sample_from_are_made_unless_in_place(in_place: bool):
    model = trained_adapter()
    with sampling_weights(model, torch.float32, batch_size=4, in_place=in_place):
        assert any("forward" in vars(module) for module in model.modules()) != in_place


@pytest.mark.parametrize("in_place", [False, True])
def test_a_bf16_base_is_sampled_from_as_it_is_scored(in_place: bool):
    policy = policy_of(trained_adapter())
    engine = engine_of(policy, max_tokens=1000)
    engine.in_place = in_place
    prompts = [Prompt(0, "x", (5, 6, 7), {}), Prompt(1, "x", (8,), {})]
    rollouts = engine.generate(prompts, 3, max_completion_length=9, key=SamplingKey(0))
    torch.testing.assert_close(rollouts.logprobs, policy.logprobs(rollouts.groups, max_tokens=999), rtol=0, atol=1e-4)


def test_no_fp32_copy_of_a_frozen_layer_is_kept_for_the_backward_pass():
    model = trained_adapter()
    shapes = {tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, FrozenLinear)}
    kept: list[torch.Tensor] = []
    policy = policy_of(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        policy.outputs(GROUPS, Wants())
    frozen = {tensor.dtype for tensor in kept if tuple(tensor.shape) in shapes}
    assert frozen == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reference_saved_in_two_bytes_keeps_them_and_is_the_policy_to_the_last_bit(dtype: torch.dtype):
    model: Any = make_model(tie_word_embeddings=False)
    policy = policy_of(model.to(dtype).float())
    assert policy._reference is not None
    sizes = {name: p.element_size() for name, p in policy._reference.model.named_parameters()}
    assert {size for name, size in sizes.items() if "norm" not in name} == {2}
    assert torch.equal(policy.ref_logprobs(GROUPS, max_tokens=99), policy.logprobs(GROUPS, max_tokens=99))
    # Weights that are no numbers of two bytes stay.
    whole = policy_of(make_model())._reference
    assert whole is not None
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}


def test_a_run_on_a_bf16_folder_keeps_it_so_and_its_merged_model_is_its_policy(
    write_recipe: Callable[..., Path], tiny_folder: Path, tmp_path: Path
):
    make_model().bfloat16().save_pretrained(tiny_folder)
    recipe = write_recipe(model={"path": str(tiny_folder), "lora": {"rank": 2}}, steps=1)
    loop = build_loop(load_recipe(recipe), quiet=True)
    loop.run(resume=False)
    policy: Any = loop.learner.policy
    assert {(p.requires_grad, p.element_size()) for p in policy.module.parameters() if p.ndim == 2} == {
        (False, 2), (True, 4)}  # fmt: skip
    policy.save(tmp_path / "saved", card="")
    merged = policy_of(load_model(ModelSpec(path=str(tmp_path / "saved"))))
    logprobs = [each.logprobs(GROUPS, max_tokens=99) for each in (policy, merged)]
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)


def test_adapters_that_read_their_bases_weights_get_fp32(write_recipe: Callable[..., Path]):
    assert asks_its_base(LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True))
    dora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    objects = Objects(model=make_model().bfloat16(), tokenizer=make_tokenizer(), lora=dora)
    loop = build_loop(load_recipe(write_recipe()), objects, quiet=True)
    policy: Any = loop.learner.policy
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["mamba2", "glm_moe_dsa"])
def test_an_architecture_that_reads_past_its_layers_is_held_in_fp32(caplog: pytest.LogCaptureFixture, name: str):
    model = tiny(name, window=30, length=64).bfloat16().requires_grad_(False)
    raised = copy.deepcopy(model).float()
    keep_frozen(model, check_head)
    assert ("its base is held in fp32" in caplog.text) == (name == "mamba2")
    with torch.no_grad():
        found = [LogprobModel(each, temperature=1.0)(long_groups()).logprobs for each in (model, raised)]
    assert torch.equal(*found)


def test_constants_that_bf16_would_round_are_loaded_in_fp32(tmp_path: Path):
    model = tiny("gemma3_text", window=30, length=64)  # √32 is no bf16 number
    model.bfloat16().save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(path=str(tmp_path)), as_saved=True)
    assert float(loaded.get_input_embeddings().embed_scale) == pytest.approx(32**0.5, rel=1e-6)
