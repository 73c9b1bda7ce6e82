"""Every field of LoraConfig and method of peft: one policy for trainer, sampler, base and saved folder, or refused.

What is listed here is what the installed peft has: a new field or method fails until it is considered.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, LoraRuntimeConfig
from support.engines import engine_of

from dar import ConfigError, DARConfig, DARTrainer, GRPOSpec, Trainer, TrainingConfig
from dar.assembly.adapter import adapted, require_named_base
from dar.assembly.loop import build_loop
from dar.batch import Prompt
from dar.config.model import ModelSpec
from dar.config.recipe import load_recipe
from dar.policies.precision import Precision
from dar.policies.text.loading import load_model
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey

FP32 = Precision(torch.device("cpu"), torch.float32)
PROMPTS = [Prompt(0, "x", (5, 6, 7), {}), Prompt(1, "x", (250, 2), {})]
SMALL: dict[str, Any] = {"num_hidden_layers": 1}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]

Case = tuple[dict[str, Any], dict[str, Any], str | None]
"""Fields of the configuration, changes of the model, and what the refusal says (None: it is trained)."""

π0 = "π₀ would be another model, or move"
LORA = peft.tuners.lora.config
# Trained with this value, or with each of a list.
TRAINED: dict[str, Any] = {
    "task_type": [None, "SEQ_CLS"], "auto_mapping": {"base_model_class": "x", "parent_library": "y"},
    "peft_version": "0.1", "base_model_name_or_path": "elsewhere", "revision": "main", "r": 3,
    "target_modules": ["all-linear", r".*\.q_proj"], "exclude_modules": [["v_proj"]], "lora_alpha": 3,
    "lora_dropout": 0.5, "fan_in_fan_out": True, "bias": "all",  # there is none
    "modules_to_save": [["norm"], ["embed_tokens"], ["lm_head"]], "init_lora_weights": ["gaussian", "mica", "eva"],
    "layers_to_transform": [[0]], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 64},
    "megatron_core": "elsewhere", "trainable_token_indices": [[250, 251]], "eva_config": peft.EvaConfig(),
    "use_dora": True, "velora_config": LORA.VeloraConfig(), "use_qalora": True,
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
}  # fmt: skip
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
BIASED: dict[str, Any] = {"attention_bias": True}
# Further cases of these and other fields.
FIELDS: dict[str, list[Case]] = {
    "peft_type": [],  # the methods below
    "inference_mode": [({"inference_mode": True}, {}, "has no effect on the log-probabilities")],
    "target_modules": [
        *(({"target_modules": targets}, {}, f"its target base_model.model.{named} shares a weight")
          for targets, named in (
              (["embed_tokens"], "model.embed_tokens"), (["lm_head"], "lm_head"),
              (["embed_tokens", "lm_head"], "model.embed_tokens"),
          )),
        ({"target_modules": ["embed_tokens", "lm_head"]}, UNTIED, None),
    ],
    "bias": [({"bias": kind}, BIASED, rf"LoraConfig\(bias='{kind}'\) .*{π0}") for kind in ("all", "lora_only")],
    "use_rslora": [({"use_rslora": True, "r": 4}, {}, None)],
    "modules_to_save": [({"modules_to_save": ["lm_head"]}, UNTIED, None)],
    "init_lora_weights": [
        ({"init_lora_weights": "orthogonal", "r": 2}, {}, None),
        *(({"init_lora_weights": kind, "r": 2}, {}, f"init_lora_weights='{kind}'.*{π0}")
          for kind in ("pissa", "pissa_niter_2", "olora")),
    ],
    "layers_pattern": [({"layers_to_transform": [0], "layers_pattern": "layers"}, {}, None)],
    "megatron_config": [({"megatron_config": {"a": 1}}, {}, "megatron")],
    "trainable_token_indices": [({"trainable_token_indices": {"embed_tokens": [250]}}, UNTIED, None)],
    "loftq_config": [
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, {}, "(loftq|cannot be applied)"),
    ],
    "corda_config": [
        ({"init_lora_weights": "corda", "corda_config": LORA.CordaConfig()}, {}, "run `preprocess_corda` first"),
    ],
    "lora_ga_config": [({"init_lora_weights": "lora_ga", "lora_ga_config": LORA.LoraGAConfig()}, {}, None)],
    "use_dora": [({"use_dora": True}, BIASED, None)],
    "alora_invocation_tokens": [({"alora_invocation_tokens": [5, 6]}, {}, "aLoRA does not support merging")],
    "qalora_group_size": [({"use_qalora": True, "qalora_group_size": 4}, {}, None)],
    "monteclora_config": [({"monteclora_config": LORA.MontecloraConfig()}, {}, "monteclora_config=Monte.*cannot be")],
    "layer_replication": [
        ({"layer_replication": [[0, 1], [0, 1]]}, {}, rf"layer_replication=\[\[0, 1\], \[0, 1\]\].*{π0}"),
    ],
    "lora_bias": [
        ({"lora_bias": True}, {}, "lora_bias=True.*base layer has no bias"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, BIASED, None),
    ],
    "target_parameters": [({"target_modules": [], "target_parameters": ["gate_proj.weight"]}, {}, None)],
    "use_bdlora": [
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2), "target_modules": ["q_proj"]},
         {}, None),
    ],
    "arrow_config": [({"arrow_config": LORA.ArrowConfig()}, {}, "cannot be applied")],
    "kasa_config": [({"kasa_config": LORA.KasaConfig()}, {}, f"kasa_config=KasaConfig.*{π0}")],
    "ensure_weight_tying": [
        ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, {}, None),
        ({"ensure_weight_tying": True, "trainable_token_indices": [250]}, {}, None),
        ({"ensure_weight_tying": True, "target_modules": ["embed_tokens"]}, {}, "ensure_weight_tying=True.*cannot be"),
    ],
}  # fmt: skip
UNMERGED = "its kind cannot be merged into the model's weights"
BETWEEN = "its ranks are to be adapted between steps"
NOT_ZERO = "before the first step the policy already differs"
METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "LORA": ({}, None),
    "ADALORA": ({"total_step": 9}, BETWEEN),
    "ADAMSS": ({}, BETWEEN),
    "ADAPTION_PROMPT": ({"target_modules": None, "adapter_layers": 1, "adapter_len": 3}, UNMERGED),
    "BEFT": ({}, "Base layer has no bias"),
    "BOFT": ({"boft_block_size": 4}, None),
    "C3A": ({"block_size": 16}, NOT_ZERO),
    "CARTRIDGE": ({"num_virtual_tokens": 3}, UNMERGED),
    "CPT": ({"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]}, UNMERGED),
    "DEFT": ({}, None),
    "DELORA": ({}, None),
    "FOURIERFT": ({"n_frequency": 20}, NOT_ZERO),
    "FROD": ({}, None),
    "GLORA": ({}, None),
    "GRALORA": ({}, None),
    "HIRA": ({"r": 4}, None),
    "HRA": ({"r": 4}, None),
    "IA3": ({"feedforward_modules": ["down_proj"]}, None),
    "LILY": ({}, "Lily"),
    "LN_TUNING": ({"target_modules": ["input_layernorm"]}, None),
    "LOHA": ({}, None),
    "LOKR": ({}, None),
    "MISS": ({"r": 4}, None),
    "OFT": ({"oft_block_size": 4}, None),
    "SHIRA": ({"r": 2}, None),
    "PROMPT_TUNING": ({"num_virtual_tokens": 3}, UNMERGED),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 3}, UNMERGED),
    "OSF": ({}, None),
    "P_TUNING": ({"num_virtual_tokens": 3}, UNMERGED),
    "PEANUT": ({}, None),
    "POLY": ({}, "task_ids should not be None"),
    "PREFIX_TUNING": ({"num_virtual_tokens": 3}, UNMERGED),
    "PSOFT": ({"r": 4}, None),
    "PVERA": ({"target_modules": ["q_proj"]}, "in training mode it is another policy"),
    "RANDLORA": ({"target_modules": ["q_proj"]}, None),
    "ROAD": ({"group_size": 4}, None),
    "SHADOW": ({}, "ShadowPEFT cannot be merged"),
    "SUPERTUNING": ({}, None),
    "TINYLORA": ({}, None),
    "TRAINABLE_TOKENS": ({"target_modules": None, "token_indices": [250, 251]}, None),
    "UNILORA": ({}, NOT_ZERO),
    "VBLORA": ({"vector_length": 16, "num_vectors": 8}, NOT_ZERO),
    "VERA": ({"target_modules": ["q_proj"]}, None),
    "WAVEFT": ({"n_frequency": 20}, None),
    "XLORA": ({}, "cannot be applied"),
}


def cases() -> Iterator[Any]:
    alone: dict[str, list[Case]] = {
        field: [({field: value}, {}, None) for value in (values if isinstance(values, list) else [values])]
        for field, values in TRAINED.items()
    }
    for field in alone | FIELDS:
        for number, (settings, changes, refused) in enumerate([*alone.get(field, []), *FIELDS.get(field, [])]):
            yield pytest.param("LORA", settings, changes, refused, id=f"{field}-{number}")
    for method, (settings, refused) in METHODS.items():
        yield pytest.param(method, settings, {}, refused, id=method)


def test_every_field_and_method_is_considered():
    assert {field.name for field in dataclasses.fields(LoraConfig)} == TRAINED.keys() | FIELDS.keys()
    assert {method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING} == METHODS.keys()


def configuration(method: str, settings: dict[str, Any]) -> Any:
    kind: Any = next(kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == method)
    fields = {field.name for field in dataclasses.fields(kind)}
    usual = {"task_type": "CAUSAL_LM", "target_modules": PROJECTIONS}
    return kind(**{name: value for name, value in usual.items() if name in fields} | settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "settings", "changes", "refused"), list(cases()))
def test_adapter_is_one_policy_for_all_or_refused(
    method: str, settings: dict[str, Any], changes: dict[str, Any], refused: str | None, tmp_path: Path
):
    def fresh() -> Any:
        return make_model(**SMALL, **changes)

    base, config = fresh(), configuration(method, settings)
    rng = torch.get_rng_state()
    if refused is not None and refused != NOT_ZERO:
        with pytest.raises(ConfigError, match=refused):
            adapted(base, config, seed=0)
        return
    model = adapted(base, config, seed=0)
    assert torch.equal(torch.get_rng_state(), rng)
    policy = Policy(model, make_tokenizer(), FP32, temperature=1.0)
    engine = engine_of(policy, max_tokens=1000)
    groups = engine.generate(PROMPTS, 2, max_completion_length=6, key=SamplingKey(0)).groups
    before, start = policy.ref_logprobs(groups, max_tokens=1000), policy.logprobs(groups, max_tokens=1000)
    # π₀ is the model that was given, and the policy starts there; one that does not is refused before the first step.
    plain = Policy(fresh(), make_tokenizer(), FP32, temperature=1.0, with_reference=False)
    torch.testing.assert_close(before, plain.logprobs(groups, max_tokens=1000), rtol=0, atol=1e-5)
    assert ((start - before).abs().max() > 1e-3) == (refused == NOT_ZERO)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        policy.module(groups).logprobs[0].sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
    model.eval()
    assert (policy.logprobs(groups, max_tokens=1000) - start).abs().max() > 1e-3
    assert torch.equal(policy.ref_logprobs(groups, max_tokens=1000), before)
    sampled = engine.generate(PROMPTS, 2, max_completion_length=6, key=SamplingKey(0))
    trained = policy.logprobs(sampled.groups, max_tokens=1000)
    torch.testing.assert_close(sampled.logprobs, trained, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(fresh(), tmp_path).merge_and_unload()  # pyright: ignore
    merged.save_pretrained(tmp_path / "merged")
    for again in (merged, type(merged).from_pretrained(tmp_path / "merged")):
        read = Policy(again, make_tokenizer(), FP32, temperature=1.0, with_reference=False)
        torch.testing.assert_close(read.logprobs(sampled.groups, max_tokens=1000), trained, rtol=0, atol=1e-4)


# --- where adapters come from, and where they go ---------------------------------------------------------------------

ROWS = [{"prompt": f"say {word}"} for word in ("a", "bee", "sea", "dee")]


def reward(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def plain_lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | changes)


def trainer(folder: Path, model: Any, *, algorithm: Any = None, **others: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "learning_rate": 0.05,
        "max_completion_length": 6, "save_steps": 1, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    others = {"processing_class": make_tokenizer(chat=False), **others}
    if algorithm is None:
        return DARTrainer(model, reward, DARConfig(**settings), ROWS, **others)
    return Trainer(model, reward, TrainingConfig(**settings), ROWS, algorithm=algorithm, **others)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    assert run.loop is not None
    return {name: p.detach().clone() for name, p in run.loop.learner.policy.trainable().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_run_with_dora_samples_from_its_own_policy_to_the_end(tmp_path: Path):
    result = trainer(tmp_path / "run", make_model(**SMALL), peft_config=plain_lora(use_dora=True)).train()
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in result.metrics if "rollout/logprob_gap" in row)
    assert result.metrics[-1]["kl/ref"] > 1e-3


def test_same_seed_is_the_same_adapter_whatever_was_drawn_before_and_whatever_the_method(tmp_path: Path):
    starts = []
    for number, algorithm in enumerate((None, GRPOSpec())):
        run = trainer(tmp_path / str(number), make_model(**SMALL), algorithm=algorithm, peft_config=plain_lora())
        torch.manual_seed(100 + number)
        run.loop = build_loop(run.spec, run._objects, quiet=True)
        starts.append(weights(run))
    assert equal(*starts)
    assert any(name.endswith("lora_A.default.weight") and tensor.any() for name, tensor in starts[0].items())
    other = adapted(make_model(**SMALL), plain_lora(), seed=4)
    assert not equal(starts[0], {name: p for name, p in other.named_parameters() if p.requires_grad})


def test_run_with_an_adapter_that_died_goes_on_to_the_same_bytes(tmp_path: Path):
    config = {"peft_config": plain_lora(use_dora=True, modules_to_save=["norm"])}
    whole = trainer(tmp_path / "whole", make_model(**SMALL), **config)
    whole.train()
    torch.manual_seed(9)
    again = trainer(tmp_path / "whole", make_model(**SMALL), **config)
    # Without its last checkpoint the run stands where it stood after the first step.
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-2")
    again.train(resume_from_checkpoint=True)
    assert equal(weights(whole), weights(again))


def test_model_that_comes_with_its_adapter_is_trained_like_one_that_gets_it(tmp_path: Path):
    torch.manual_seed(0)
    wrapped = get_peft_model(make_model(**SMALL), plain_lora(use_dora=True))
    run = trainer(tmp_path / "run", wrapped)
    result = run.train()
    assert result.metrics[0]["kl/ref"] == pytest.approx(0.0, abs=1e-5)
    assert result.metrics[-1]["kl/ref"] > 1e-3
    with pytest.raises(ConfigError, match="the model has an adapter already"):
        trainer(tmp_path / "second", wrapped, peft_config=plain_lora()).train()


@pytest.mark.filterwarnings("ignore")
def test_model_that_comes_with_an_adapter_that_moves_the_reference_is_refused(tmp_path: Path):
    wrapped = get_peft_model(make_model(attention_bias=True, **SMALL), plain_lora(bias="all"))
    before = {name: p.detach().clone() for name, p in wrapped.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"bias='all'.*{π0}"):
        trainer(tmp_path / "run", wrapped).train()
    # Nothing was left moved, and no run stands in the way of the next.
    assert equal(before, dict(wrapped.state_dict()))
    assert not (tmp_path / "run" / "config.yaml").exists()
    transformers_own = make_model(**SMALL)
    transformers_own.add_adapter(plain_lora())
    with pytest.raises(ConfigError, match="cannot be trained here"):
        trainer(tmp_path / "run", transformers_own).train()


def test_recipe_that_targets_a_tied_head_is_refused(write_recipe: Any, tiny_folder: Path):
    recipe = write_recipe(model={"path": str(tiny_folder), "lora": {"rank": 2, "target_modules": ["lm_head"]}})
    with pytest.raises(ConfigError, match=r"its target base_model\.model\.lm_head shares a weight"):
        build_loop(load_recipe(recipe), quiet=True)


def test_adapter_whose_folder_would_name_another_model_is_refused(tmp_path: Path, tiny_folder: Path):
    spec = ModelSpec(path=str(tiny_folder))
    require_named_base(load_model(spec))
    require_named_base(load_model(spec).bfloat16().float())
    require_named_base(make_model())
    resized = load_model(spec)
    resized.resize_token_embeddings(270, mean_resizing=False)
    merged = get_peft_model(load_model(spec), plain_lora(init_lora_weights=False)).merge_and_unload()  # pyright: ignore
    for number, model in enumerate((resized, merged)):
        with pytest.raises(ConfigError, match=r"is not the one in .*tiny-model.*Save it first, model\.save_pretrained"):
            trainer(tmp_path / f"run-{number}", model, peft_config=plain_lora()).train()
