"""Held-out rewards: measured beside the rewards that are trained on, and never trained on themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from support.engines import engine_of
from support.handmade import make_spec
from transformers import AutoModelForCausalLM

from dar.assembly.loop import build_loop
from dar.batch import Prompt
from dar.config.recipe import load_recipe
from dar.data.logged import token_groups
from dar.errors import ConfigError, DataError
from dar.policies.precision import Precision
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey
from dar.run.loop import Loop
from dar.trainer import run_loop

GOLD = [
    {"type": "pattern_count", "pattern": "[a-z]", "name": "letters", "weight": 2.0},
    {"type": "length", "target": 4, "name": "length_too", "weight": -1.0},
]
FP32 = Precision(torch.device("cpu"), torch.float32)
REPEATABLE = ("time/", "step_time", "memory/", "eval/time")


def run(recipe: Path, *overrides: str) -> list[dict[str, Any]]:
    spec = load_recipe(recipe, overrides)
    run_loop(build_loop(spec, quiet=True), resume=False, command="test")
    rows = [json.loads(line) for line in (Path(spec.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(REPEATABLE)} for row in rows]


def test_gold_is_measured_and_changes_nothing_that_is_trained(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"rewards": GOLD, "every": 2})
    with_gold = run(recipe, f"output_dir={tmp_path / 'with'}")
    without = run(recipe, f"output_dir={tmp_path / 'without'}", "evaluation.rewards=[]")
    gold_keys = {"eval/gold", "eval/gold/letters/mean", "eval/gold/length_too/mean"}
    evaluations = [row for row in with_gold if "eval/gold" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    for row in evaluations:
        assert {key for key in row if key.startswith("eval/gold")} == gold_keys
        # 2 · letters − 1 · length, each mean over the same completions.
        expected = 2.0 * row["eval/gold/letters/mean"] - row["eval/gold/length_too/mean"]
        assert row["eval/gold"] == pytest.approx(expected, rel=1e-5)
        # The training reward is the same length reward, so the two views of it must agree.
        assert row["eval/gold/length_too/mean"] == row["eval/rewards/length/mean"] == row["eval/reward"]
    assert [{key: value for key, value in row.items() if key not in gold_keys} for row in with_gold] == without


def test_gold_of_every_completion_is_written_down(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"rewards": GOLD}, steps=1)
    rows = run(recipe)
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "heldout-step-0.parquet").to_pydict()
    assert [name for name in table if name.startswith("gold")] == ["gold", "gold/letters", "gold/length_too"]
    letters = [sum("a" <= character <= "z" for character in text) for text in table["completion"]]
    assert table["gold/letters"] == letters
    assert rows[0]["eval/gold"] == pytest.approx(sum(table["gold"]) / len(letters), rel=1e-5)
    assert "gold reward, not trained on" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_gold_without_heldout_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.rewards measure held-out completions, but data\.heldout"):
        make_spec(evaluation={"rewards": ["sentiment"]})


def test_gold_rewards_need_their_own_names():
    data = {"train": "a.jsonl", "heldout": "b.jsonl"}
    with pytest.raises(ConfigError, match=r"evaluation.rewards: rewards share a name \(sentiment\)"):
        make_spec(data=data, evaluation={"rewards": ["sentiment", "sentiment"]})
    # The same name as a training reward is no clash: their metrics stand apart.
    make_spec(data=data, evaluation={"rewards": ["sentiment"]})


def test_an_entry_of_the_gold_rewards_can_be_overridden(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"rewards": ["sentiment"]})
    (reward,) = load_recipe(recipe, ["evaluation.rewards.0.weight=3.0"]).evaluation.rewards
    assert (reward.type, reward.weight) == ("sentiment", 3.0)


# --- completions to be read ------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(folder / "completions" / f"{name}.parquet").to_pydict()


def test_what_is_to_be_read_is_drawn_at_the_temperature_of_the_initial_entropy(
    write_recipe: Callable[..., Path], tmp_path: Path, tokenizer: Any
):
    prompts = str(tmp_path / "prompts.jsonl")
    sampling = {"max_completion_length": 8, "temperature": 0.9}
    rows = run(write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"every": 2}, sampling=sampling))
    entropies = [row["eval/entropy"] for row in rows if "eval/entropy" in row]
    assert len(set(entropies)) == 3
    assert min(entropies) > 1
    tables = [read(tmp_path / "run", f"to-read-step-{step}") for step in (0, 2, 3)]
    for table in tables:
        assert table["prompt"] == ["say a", "say bee", "say sea"]
        assert table["temperature"] == [0.9 / entropies[0]] * 3
    assert tables[0]["completion"] != tables[-1]["completion"]
    # The trained model by itself, at that temperature and with the evaluation's random numbers.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    policy = Policy(model, tokenizer, FP32, temperature=0.9 / entropies[0], with_reference=False)
    asked = [
        Prompt(place, "", tuple(tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)), {})
        for place, each in enumerate([[{"role": "user", "content": text}] for text in tables[0]["prompt"]])
    ]
    key = SamplingKey(0, "heldout")
    found = engine_of(policy, max_tokens=1000).generate(asked, 1, max_completion_length=8, key=key)
    assert tables[-1]["completion"] == list(found.texts)


def test_what_is_to_be_read_is_drawn_as_the_evaluation_where_that_does_not_draw_plainly(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    prompts = str(tmp_path / "prompts.jsonl")
    run(write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"greedy": True}, steps=1))
    found, measured = read(tmp_path / "run", "to-read-step-1"), read(tmp_path / "run", "heldout-step-1")
    assert found == {"prompt": measured["prompt"][:3], "completion": measured["completion"][:3],
                     "temperature": [None] * 3}  # fmt: skip


def test_a_model_that_is_nearly_sure_is_not_warmed_and_prompts_are_spread(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    prompts = str(tmp_path / "prompts.jsonl")
    loop = build_loop(load_recipe(write_recipe(data={"train": prompts, "heldout": prompts})), quiet=True)
    assert loop.heldout is not None
    heldout = replace(loop.heldout, prompts=[*loop.heldout.prompts, *loop.heldout.prompts])
    heldout.engine.sync(heldout.policy, 0)
    found = heldout.to_read(0.5)
    assert found["temperature"] == [1.0] * 3
    assert found["prompt"] == ["say a", "say dee", "say bee"]  # the first, fourth and seventh of ten


# --- completions of the data -----------------------------------------------------------------------------------------


PAIRS = [
    {"prompt": f"say {word}: ", "completion": word, "chosen": word, "rejected": f"no {word}"}
    | {"chosen_complies": index > 1, "rejected_complies": index == 0}
    for index, word in enumerate(("a", "bee", "sea", "dee"))
]


def offline(
    write_recipe: Callable[..., Path], tmp_path: Path, method: str, keys: dict[str, Any], **changes: Any
) -> Loop:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    data = {"train": str(file), "heldout": str(file)}
    recipe = write_recipe(data=data, algorithm={"type": method, **keys}, evaluation={"every": 1}, steps=2, **changes)
    return build_loop(load_recipe(recipe), quiet=True)


@pytest.mark.parametrize("method", ["dpo", "trace"])
def test_pairs_are_measured_without_any_reward(write_recipe: Callable[..., Path], tmp_path: Path, method: str):
    loop = offline(write_recipe, tmp_path, method, {"beta": 0.1}, rewards=[])
    rows = run_loop(loop, resume=False, command="test").metrics
    found = [row for row in rows if "eval/rewards/margins" in row]
    assert [row["step"] for row in found] == [0, 1, 2]
    # Before training the policy is π₀: every margin is 0, which is half an accuracy, and −log σ(0) = log 2.
    assert (found[0]["eval/rewards/accuracies"], found[0]["eval/rewards/margins"]) == (0.5, 0.0)
    assert found[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert not any(key.startswith(("eval/reward_", "eval/completions")) or key == "eval/reward" for key in found[-1])
    # After it, by hand: margins β·Δ with β = 0.1, of chosen and rejected as the file has them, whatever TRACE inverts.
    assert loop.known is not None
    groups = token_groups(loop.known.groups)
    policy = loop.learner.policy
    ratios = (policy.logprobs(groups, max_tokens=4096) - policy.ref_logprobs(groups, max_tokens=4096)).sum(1)
    margins = 0.1 * (ratios[0::2] - ratios[1::2])
    assert found[-1]["eval/rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert found[-1]["eval/rewards/accuracies"] == float((margins > 0).float().mean())
    assert found[-1]["eval/loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), rel=1e-5)
    assert not list((tmp_path / "run" / "completions").glob("heldout-*"))
    assert "| accuracy, held-out pairs | 50.0% |" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_with_rewards_both_are_measured_and_the_best_pairs_can_be_kept(
    write_recipe: Callable[..., Path], tmp_path: Path
):
    loop = offline(write_recipe, tmp_path, "sft", {}, checkpoint={"best": {"metric": "eval/loss", "mode": "min"}})
    last = run_loop(loop, resume=False, command="test").metrics[-1]
    # SFT's loss is the mean of −log π over all tokens of the demonstrations.
    assert loop.known is not None
    groups = token_groups(loop.known.groups)
    logprobs = loop.learner.policy.logprobs(groups, max_tokens=4096)
    assert last["eval/loss"] == pytest.approx(float(-logprobs.sum() / groups.mask.sum()), rel=1e-5)
    assert {"eval/reward", "eval/kl/ref"} < last.keys()
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == 2


def test_prompts_alone_are_not_enough_without_rewards(write_recipe: Callable[..., Path], tmp_path: Path):
    offline(write_recipe, tmp_path, "dpo", {}, rewards=[], output_dir=str(tmp_path / "other"))
    data = {"train": str(tmp_path / "pairs.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")}
    spec = load_recipe(write_recipe(data=data, algorithm="dpo", rewards=[]))
    with pytest.raises(DataError, match=r"prompts\.jsonl: row 0 has no column 'chosen'"):
        build_loop(spec, quiet=True)
    with pytest.raises(ConfigError, match=r"evaluation\.rewards stand beside rewards, but rewards is empty"):
        load_recipe(write_recipe(data=data, algorithm="dpo", rewards=[], evaluation={"rewards": GOLD}))
