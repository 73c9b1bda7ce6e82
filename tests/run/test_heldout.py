"""Held-out rewards: measured beside the rewards that are trained on, and never trained on themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from support.handmade import make_spec

from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.trainer import run_loop

GOLD = [
    {"type": "pattern_count", "pattern": "[a-z]", "name": "letters", "weight": 2.0},
    {"type": "length", "target": 4, "name": "length_too", "weight": -1.0},
]
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
    with pytest.raises(ConfigError, match=r"evaluation: rewards share a name \(sentiment\)"):
        make_spec(data=data, evaluation={"rewards": ["sentiment", "sentiment"]})
    # The same name as a training reward is no clash: their metrics stand apart.
    make_spec(data=data, evaluation={"rewards": ["sentiment"]})


def test_an_entry_of_the_gold_rewards_can_be_overridden(write_recipe: Callable[..., Path], tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    recipe = write_recipe(data={"train": prompts, "heldout": prompts}, evaluation={"rewards": ["sentiment"]})
    (reward,) = load_recipe(recipe, ["evaluation.rewards.0.weight=3.0"]).evaluation.rewards
    assert (reward.type, reward.weight) == ("sentiment", 3.0)
