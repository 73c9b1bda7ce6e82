"""Reward models as rewards: what they read, what they refuse, and a run that resumes with the same calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.reward_models import make_classifier, save_classifier

from dar.assembly.loop import build_loop
from dar.assembly.plan import make_plan
from dar.assembly.reward import build_reward
from dar.config.model import ModelSourceSpec
from dar.config.model_reward import ModelRewardSpec
from dar.config.recipe import load_recipe
from dar.config.run import ComputeSpec
from dar.errors import ConfigError, RewardError
from dar.policies.precision import Precision
from dar.reward_model.reward import ModelReward
from dar.reward_model.score_model import ScoreModel
from dar.trainer import run_loop

RUNTIME = ComputeSpec(device="cpu", precision="fp32")
USER = [{"role": "user", "content": "say a"}]
OTHER = [{"role": "user", "content": "say something longer than a"}]


def build(folder: Path, **settings: Any) -> ModelReward:
    spec = ModelRewardSpec.model_validate({"model": str(folder), "precision": "fp32", **settings})
    function = build_reward(spec, {}, RUNTIME).function
    assert isinstance(function, ModelReward)
    return function


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@torch.no_grad()
def plain_score(ids: Any) -> float:
    return float(make_classifier()(input_ids=torch.tensor([list(ids)])).logits[0, 0])


def test_conversations_are_scored_under_the_models_own_template(tmp_path: Path):
    reward, tokenizer = build(save_classifier(tmp_path / "rm")), make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    reward.tokenizer = tokenizer
    prompts, answers = [USER, USER, OTHER], [said("a"), said("b, b"), said("c")]
    found = reward(prompts, answers)
    texts = ["[user]say a[assistant]a", "[user]say a[assistant]b, b", f"[user]{OTHER[0]['content']}[assistant]c"]
    assert found == pytest.approx([plain_score(tokenizer(text)["input_ids"]) for text in texts], rel=1e-4, abs=1e-5)


def test_layers_in_bf16_under_a_head_in_fp32_are_loaded_and_score(tmp_path: Path):
    # What `precision: auto` means on a processor with bf16.
    folder = save_classifier(tmp_path / "rm")
    rounded, exact = build(folder, precision="bf16"), build(folder)
    dtypes = [next(each.parameters()).dtype for each in (rounded.module.model.model.layers, rounded.module.model.score)]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert rounded.module.way == exact.module.way == "packed"
    assert rounded([USER], [said("a")]) == pytest.approx(exact([USER], [said("a")]), rel=0.1, abs=0.1)


def test_plain_text_is_joined(tmp_path: Path):
    reward = build(save_classifier(tmp_path / "rm", chat=False))
    ids = make_tokenizer()("2 + 2 = 4")["input_ids"]
    assert reward(["2 + 2 = "], ["4"]) == pytest.approx([plain_score(ids)], rel=1e-4, abs=1e-5)
    with pytest.raises(ConfigError, match="the reward model: prompts are messages, but the tokenizer has no"):
        reward([USER], [said("4")])


def test_scores_do_not_depend_on_the_batches(tmp_path: Path):
    folder = save_classifier(tmp_path / "rm")
    prompts = [USER] * 3 + [OTHER] * 3
    answers = [said("x" * length) for length in (1, 9, 4, 2, 17, 3)]
    alone = build(folder, max_tokens_per_batch=1)(prompts, answers)
    together = build(folder, max_tokens_per_batch=10_000)(prompts, answers)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_a_conversation_that_is_too_long_is_refused_or_its_end_is_read(tmp_path: Path):
    folder = save_classifier(tmp_path / "rm")
    with pytest.raises(RewardError, match=r"a conversation has 14 tokens for the reward model, which reads at most 6"):
        build(folder, max_length=6)([USER], [said("hello")])
    end = build(folder, max_length=6, too_long="keep_end")([USER], [said("hello")])
    tokenizer: Any = make_tokenizer()
    ids = tokenizer.apply_chat_template([*USER, *said("hello")], return_dict=True)["input_ids"][-6:]
    assert end == pytest.approx([plain_score(ids)], rel=1e-4, abs=1e-5)
    with pytest.raises(RewardError, match="which reads at most 256"):
        build(folder)([USER], [said("x" * 300)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: save_classifier(folder, num_labels=3),
            r"has 3 outputs \(num_labels\), but a reward model has one",
        ),
        (lambda folder: make_model().save_pretrained(folder), "LlamaForCausalLM, not a reward model"),
    ],
)
def test_other_models_are_refused_before_and_by_a_plan(
    tmp_path: Path, make: Callable[[Path], Any], message: str, write_recipe: Callable[..., Path]
):
    folder = tmp_path / "other"
    make(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=message):
        build(folder)
    recipe = write_recipe(rewards=[{"type": "model", "model": str(folder)}])
    with pytest.raises(ConfigError, match=message):
        make_plan(load_recipe(recipe))


def test_pickled_and_missing_weights_are_refused(tmp_path: Path):
    folder = save_classifier(tmp_path / "rm")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pickled ones are not read"):
        build(folder)


# --- calibration and whole runs --------------------------------------------------------------------------------------


def test_calibration_gives_mean_0_and_standard_deviation_1():
    reward = ModelReward(
        ScoreModel(make_classifier()),
        make_tokenizer(),
        Precision(torch.device("cpu"), torch.float32),
        ModelRewardSpec(model=ModelSourceSpec(path="m")),
        None,
    )
    # Mean 2, sample variance (1 + 0 + 1) / 2 = 1.
    reward.calibrate([1.0, 2.0, 3.0], with_scale=True)
    assert (reward.shift, reward.scale) == (2.0, 1.0)
    reward.calibrate([0.0, 4.0], with_scale=False)
    assert (reward.shift, reward.scale) == (2.0, 1.0)
    with pytest.raises(RewardError, match="gives all 2 completions of the initial policy the same score"):
        reward.calibrate([1.0, 1.0], with_scale=True)


def run(recipe: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    spec = load_recipe(recipe, overrides)
    run_loop(build_loop(spec, resume=resume, quiet=True, allow_changed_recipe=resume), resume=resume, command="test")
    rows = [json.loads(line) for line in (Path(spec.output_dir) / "metrics.jsonl").read_text().splitlines()]
    skipped = ("time/", "step_time", "memory/", "eval/time")
    return [{key: value for key, value in row.items() if not key.startswith(skipped)} for row in rows]


def test_run_with_calibrated_reward_models_resumes_to_the_same_bytes(write_recipe: Callable[..., Path], tmp_path: Path):
    first = {"type": "model", "model": str(save_classifier(tmp_path / "one")), "precision": "fp32"}
    second = {**first, "model": str(save_classifier(tmp_path / "two", seed=1)), "name": "two", "weight": 0.5}
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(
        data={"train": prompts, "heldout": prompts},
        rewards=[{**first, "calibrate": {"num_prompts": 4}}, {**second, "calibrate": {"scale": False}}],
        evaluation={"rewards": [{**first, "name": "raw"}, {**second, "calibrate": {"num_prompts": 3}}]},
        steps=4,
    )
    whole = run(recipe, f"output_dir={tmp_path / 'whole'}")
    saved = tmp_path / "stopped" / "checkpoints" / "step-2" / "state.json"
    run(recipe, f"output_dir={tmp_path / 'stopped'}", "steps=2")
    kept = json.loads(saved.read_text())["calibration"]
    assert kept.keys() == {f"{name}.{key}" for name in ("model", "two", "gold.two") for key in ("shift", "scale")}
    assert kept["two.scale"] == 1.0
    assert kept["model.scale"] != 1.0
    resumed = run(recipe, f"output_dir={tmp_path / 'stopped'}", resume=True)
    # The run that was cut at step 2 evaluated there; apart from that line, nothing differs.
    assert [row for row in resumed if row["step"] != 2 or "reward" in row] == whole
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
