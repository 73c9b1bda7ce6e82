"""A teacher in π₀'s place, from a recipe: what is read, refused, learned and written down."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dar.assembly.loop import build_loop
from dar.assembly.plan import make_plan
from dar.assembly.training import TrainResult, run_loop
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.policies.text.toy import TOY, toy_folder
from dar.report.page import render_page
from dar.report.run import load_run

Write = Callable[..., Path]
WITHOUT_REWARDS: dict[str, Any] = {"algorithm": "distill", "rewards": [], "checkpoint": {"every": 0}}


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A folder with another tiny model, wider than the policy, and the policy's tokenizer."""
    return saved(tmp_path / "teacher")


def saved(folder: Path, **changes: Any) -> str:
    make_model(**{"seed": 1, "hidden_size": 64, **changes}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def trained(recipe: Path, **settings: Any) -> TrainResult:
    return run_loop(build_loop(load_recipe(recipe), quiet=True, **settings), resume=False, command="")


def steps_of(result: TrainResult) -> list[dict[str, Any]]:
    return [row for row in result.metrics if "loss" in row]


def evaluations_of(result: TrainResult) -> list[dict[str, Any]]:
    return [row for row in result.metrics if "loss" not in row]


# --- learning --------------------------------------------------------------------------------------------------------


def test_a_student_comes_to_its_teacher_without_any_reward(tmp_path: Path, write_recipe: Write):
    folder = tmp_path / "letters"
    torch.manual_seed(3)
    shape = LlamaConfig.from_pretrained(toy_folder()).to_dict()
    LlamaForCausalLM(LlamaConfig(**{**shape, "hidden_size": 48, "initializer_range": 0.3})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy_folder()).save_pretrained(folder)
    prompts = "package:dar/prompts/toy.jsonl"
    recipe = write_recipe(
        **{key: WITHOUT_REWARDS[key] for key in ("algorithm", "rewards")},
        model=TOY,
        teacher=str(folder),
        data={"train": prompts, "heldout": prompts},
        optim={"learning_rate": 1e-2},
        prompts_per_step=16,
        steps=40,
        evaluation={"num_generations": 64},
        checkpoint={"every": 0, "best": {"metric": "eval/kl/ref", "mode": "min"}},
    )
    result = trained(recipe)
    before, after = evaluations_of(result)
    assert before["eval/kl/ref"] > 1.0
    assert after["eval/kl/ref"] < 0.5 * before["eval/kl/ref"]
    assert (tmp_path / "run" / "best" / "best.json").is_file()
    steps = steps_of(result)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    # In the one update the ratio is 1, and the loss the estimate of the KL itself, here by the trainer's pass.
    assert all(row["loss"] == pytest.approx(row["kl/ref_per_token"], abs=1e-4) for row in steps)


def test_the_teacher_itself_has_nothing_to_learn(write_recipe: Write, tiny_folder: Path):
    (step, *_) = steps_of(trained(write_recipe(**WITHOUT_REWARDS, teacher=str(tiny_folder))))
    assert (step["loss"], step["grad_norm"]) == (0.0, 0.0)


def test_rewards_are_measured_and_teach_nothing(write_recipe: Write, teacher: str, tmp_path: Path):
    def result(**changes: Any) -> list[dict[str, Any]]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return steps_of(trained(write_recipe(**WITHOUT_REWARDS | changes, teacher=teacher)))

    plain, scored = result(), result(rewards=[{"type": "length", "target": 4}])
    for one, other in zip(plain, scored, strict=True):
        assert one["grad_norm"] == other["grad_norm"] > 0
        keys = {"reward", "reward_std", "frac_reward_zero_std", "rewards/length/mean", "rewards/length/std"}
        assert {key for key in other.keys() - one.keys() if "reward_length" not in key} == keys


def test_other_methods_are_held_to_the_teacher_as_to_a_reference(write_recipe: Write, teacher: str, tmp_path: Path):
    """DAR's weights aim at π_T^α π_t^(1−α)."""
    found = []
    for name in ("teacher", "reference"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        # The vocabularies are of one size.
        rows = steps_of(trained(write_recipe(algorithm={"type": "dar", "alpha": 0.5}, **{name: teacher})))
        found.append([(row["loss"], row["kl/ref"], row["weights/log_w_reg_mean"]) for row in rows])
    assert found[0] == found[1]
    for _, drift, pull in found[0]:
        assert drift > 0
        assert pull == pytest.approx(-0.5 * drift, rel=1e-4)


def test_an_adapters_base_is_not_taken_for_the_teacher(write_recipe: Write, teacher: str, tiny_folder: Path):
    data = {"train": str(tiny_folder.parent / "prompts.jsonl"), "heldout": str(tiny_folder.parent / "prompts.jsonl")}
    found = []
    for lora in (None, {"rank": 2}):
        shutil.rmtree(tiny_folder.parent / "run", ignore_errors=True)
        model = {"path": str(tiny_folder), "lora": lora}
        result = trained(write_recipe(**WITHOUT_REWARDS, teacher=teacher, model=model, data=data, steps=1))
        found.append(evaluations_of(result)[0]["eval/kl/ref"])
    assert found[0] > 0.5
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# --- what is written down --------------------------------------------------------------------------------------------


def test_a_run_without_rewards_says_so_everywhere(
    write_recipe: Write, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = str(tmp_path / "prompts.jsonl")
    keys = WITHOUT_REWARDS | {"teacher": teacher, "data": {"train": prompts, "heldout": prompts}}
    recipe = write_recipe(
        **keys, logging={"completions_every": 1}, evaluation={"rewards": [{"type": "length", "target": 3}]}
    )
    spec = load_recipe(recipe)
    result = run_loop(build_loop(spec), resume=False, command="")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"π₀ is the teacher {teacher}: every KL to π₀ is the one to it" in shown
    assert "completion: " in shown
    assert "nan" not in shown
    assert "completions of held-out prompts" in shown
    for row in result.metrics:
        # A gold reward is measured all the same.
        assert not any(key.removeprefix("eval/").startswith(("reward", "frac_reward")) for key in row)
    assert [row["eval/gold"] < 0 for row in evaluations_of(result)] == [True, True]
    folder = tmp_path / "run"
    table = pyarrow.parquet.read_table(folder / "completions" / "step-1.parquet").to_pydict()
    assert all(map(math.isnan, table["reward"]))
    assert "contribution/length" not in table
    assert table["advantage"] != [0.0] * len(table["advantage"])
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"π₀ is the teacher {teacher.replace('_', chr(92) + '_')}." in card
    page = render_page([load_run(folder)])
    assert f"<dt>π₀ is the teacher</dt><dd>{teacher}</dd>" in page
    assert "Held-out gold reward <b>" in page


def test_a_plan_counts_the_teachers_weights(write_recipe: Write, teacher: str, tiny_folder: Path):
    theirs = make_model(hidden_size=64).num_parameters()
    for lora in (None, {"rank": 2}):
        model = {"path": str(tiny_folder), "lora": lora}
        found, alone = (
            make_plan(load_recipe(write_recipe(**WITHOUT_REWARDS, model=model, **{key: path}))).memory_gb
            for key, path in (("teacher", teacher), ("reference", str(tiny_folder)))
        )
        assert 1e9 * (found["weights"] - alone["weights"]) == pytest.approx(
            4 * (theirs - make_model().num_parameters())
        )
    plan = make_plan(load_recipe(write_recipe(**WITHOUT_REWARDS, teacher=teacher)))
    assert plan.passes[:2] == ("sample 8 completions", "forward pass of the reference")


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(recipe: Path) -> str:
    """The same said by the plan and by the run."""
    said = []
    for make in (make_plan, lambda spec: build_loop(spec, quiet=True)):
        with pytest.raises(ConfigError) as caught:
            make(load_recipe(recipe))
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


def test_a_teacher_of_other_tokens_is_refused(write_recipe: Write, teacher: str, tmp_path: Path):
    folder = Path(teacher)
    tokenizer = make_tokenizer()
    tokens = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokens.replace('"<|system|>": 4', '"<|tool|>": 4'), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).get_vocab().keys() != tokenizer.get_vocab().keys()
    said = f"the teacher {teacher} must know the policy's tokens, and has no '<|system|>' of its id"
    assert refused(write_recipe(**WITHOUT_REWARDS, teacher=teacher)).endswith(said)


def test_a_teacher_may_have_more_tokens_and_not_fewer(write_recipe: Write, tmp_path: Path):
    small = saved(tmp_path / "small", vocab_size=260)
    said = f"the teacher {small} must know the policy's tokens, and has 260 tokens to its 261"
    assert refused(write_recipe(**WITHOUT_REWARDS, teacher=small)).endswith(said)
    large = saved(tmp_path / "large", vocab_size=320)  # padded to a round number
    (step, *_) = steps_of(trained(write_recipe(**WITHOUT_REWARDS, teacher=large, steps=1)))
    assert math.isfinite(step["loss"])
    assert step["loss"] > 0
    with pytest.raises(ConfigError, match="has a vocabulary of 320 tokens and the policy one of 261"):
        build_loop(load_recipe(write_recipe(reference=large, output_dir=str(tmp_path / "other"))), quiet=True)


def test_a_teacher_that_nothing_reads_is_refused(write_recipe: Write, teacher: str):
    said = "grpo as it is set reads no π₀, nor a teacher in its place: remove teacher"
    assert refused(write_recipe(algorithm={"type": "grpo", "beta": 0.0}, teacher=teacher)).endswith(said)
