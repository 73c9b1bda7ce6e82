"""The flat configurations of the Python face: what they take, and what they say of what they do not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import dar
from dar import ConfigError, DARConfig, DARSpec, RewardConfig, TargetKLSpec, Trainer, TrainingConfig
from dar.config.base import keys_below
from dar.config.run import RunSpec

MINIMAL: dict[str, Any] = {"output_dir": "run", "max_steps": 1}


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        (
            "gradient_accumulation_steps",
            "micro-batches follow from max_tokens_per_microbatch",
        ),
        ("num_train_epochs", "max_steps = epochs × number of prompts / prompts_per_step"),
        ("max_prompt_length", "use overrides=['data.max_prompt_length=…']; prompts are never cut"),
        ("bf16", "set precision to 'bf16', 'fp32' or"),
        ("top_p", "held-out prompts have overrides=['evaluation.top_p=…'] and overrides=['evaluation.top_k=…']"),
        ("loss_type", "a loss is a method: use the trainer's algorithm (dapo is "),
        ("ref_model", "use the trainer's ref_model"),
        ("epsilon", "use algorithm=GRPOSpec(clip_low=…) and algorithm=GRPOSpec(clip_high=…)"),
        ("target_kl", "use algorithm=DARSpec(beta={'target_kl': …})"),
        ("baseline", "use algorithm=DARSpec(baseline=…)"),
        ("mask_truncated", "use overrides=['sampling.mask_truncated=…']"),
        ("push_to_hub", "set hub_model_id: the model is uploaded once"),
    ],
)
@pytest.mark.parametrize("config", [DARConfig, TrainingConfig])
def test_trls_name_for_something_else_is_refused_with_the_name_to_use(
    config: type[TrainingConfig], name: str, instead: str
):
    with pytest.raises(ConfigError, match=rf"^{config.__name__}: there is no '{name}'(: | here: )") as caught:
        config(**MINIMAL | dict[str, Any]({name: 1}))
    assert instead in str(caught.value)


def test_beta_is_a_setting_of_dar_and_elsewhere_of_the_method():
    assert DARConfig(**MINIMAL, beta=0.1).beta == 0.1
    with pytest.raises(ConfigError, match=r"'beta': it belongs to the method: algorithm=GRPOSpec\(beta=…\)$"):
        TrainingConfig(**MINIMAL, beta=0.1)  # pyright: ignore[reportCallIssue]


def test_every_way_to_write_a_key_in_python_exists():
    text = "\n".join(TrainingConfig.written(key) for key in keys_below(RunSpec))
    for name, option in re.findall(r"algorithm=(\w+)\((\w+)=", text):
        assert option in getattr(dar, name).model_fields
    arguments = re.findall(r"the trainer's (\w+)", text)
    assert len(arguments) == 7
    assert arguments == [name for name in arguments if name in inspect.signature(Trainer.__init__).parameters]


def test_everything_wrong_with_a_script_of_trl_is_told_in_one_message():
    with pytest.raises(ConfigError) as caught:
        DARConfig(**MINIMAL | dict[str, Any](use_vllm=True, bf16=True, temprature=1, foo=2, alpha=2.0))
    first, *lines = str(caught.value).splitlines()
    assert first == "DARConfig cannot be used as written:"
    starts = ["there is no 'use_vllm'", "there is no 'bf16'", "unknown keys 'temprature' (did you mean", "alpha: Input"]
    assert [line.strip()[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert str(caught.value).count("allowed: ") == 1


def test_configuration_says_what_it_takes(tmp_path: Path):
    parameters = inspect.signature(DARConfig).parameters
    assert list(parameters) == list(DARConfig.model_fields)
    assert parameters["w_clip"].default == 20.0
    assert "max_steps\n      Batches of rollouts.\n  prompts_per_step = 32\n      Prompts per" in str(DARConfig.__doc__)
    args = DARConfig(output_dir=tmp_path, max_steps=5, alpha=0.1, beta=0.2)  # pyright: ignore[reportArgumentType]
    assert repr(args) == f"DARConfig(output_dir='{tmp_path}', max_steps=5, beta=0.2)"
    assert repr(DARSpec(beta=TargetKLSpec(target_kl=1.0))) == "DARSpec(beta=TargetKLSpec(target_kl=1.0))"


@pytest.mark.parametrize(
    ("config", "sizes", "said"),
    [
        (
            DARConfig,
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_generations": 8},
            "per_device_train_batch_size=16 and gradient_accumulation_steps=4 on 1 process, with num_generations=8, "
            "are prompts_per_step=8",
        ),
        (
            TrainingConfig,
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
            "on 1 process are 32 rows: prompts_per_step=32, or that by num_generations where completions are sampled",
        ),
        (
            DARConfig,
            {"generation_batch_size": 64, "num_generations": 8},
            "generation_batch_size=64 on 1 process, with num_generations=8, are prompts_per_step=8",
        ),
        (
            RewardConfig,
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "on 1 process are pairs_per_step=8",
        ),
        (DARConfig, {"per_device_train_batch_size": 5, "num_generations": 8}, None),
        (DARConfig, {"gradient_accumulation_steps": 8, "num_generations": 8}, None),
    ],
)
def test_batch_sizes_of_trl_are_worked_out(config: Any, sizes: dict[str, int], said: str | None):
    with pytest.raises(ConfigError) as caught:
        config(output_dir="run", max_steps=1, **sizes)
    assert (" process" in str(caught.value)) == (said is not None)
    assert (said or "") in str(caught.value)


def test_batch_sizes_of_several_processes_add_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "steps_per_generation=2 on 2 processes, with num_generations=4, are prompts_per_step=8"
    with pytest.raises(ConfigError, match=said):
        DARConfig(**MINIMAL, per_device_train_batch_size=8, steps_per_generation=2, num_generations=4)  # pyright: ignore[reportCallIssue]
