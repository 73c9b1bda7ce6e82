"""Tasks of reasoning-gym as rows, and their scores."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from support.handmade import make_rollouts, make_spec

from dar.assembly.reward import build_reward
from dar.config.data import SourceSpec
from dar.config.run import ComputeSpec
from dar.data.sources import load_rows
from dar.errors import ConfigError, DataError
from dar.rewards import RewardSet
from dar.verifiable.puzzles import load_reasoning_gym, score_answer

PATH = "reasoning_gym:leg_counting?size=3&seed=7"


def rows(path: str = PATH) -> list[Any]:
    pytest.importorskip("reasoning_gym")
    return list(load_rows(SourceSpec(path=path)))


def test_rows_are_a_function_of_name_size_and_seed() -> None:
    first = rows()
    assert len(first) == 3
    assert first == rows()
    assert first != rows("reasoning_gym:leg_counting?size=3&seed=8")
    # Three beetles and four bees of six legs, thirteen ducks of two, nine horses of four, seven chickens of two.
    assert "3 beetles, 4 bees, 13 ducks, 9 horses, 4 jellyfishs, 7 chickens" in first[1]["prompt"]
    assert first[1]["answer"] == str(7 * 6 + 13 * 2 + 9 * 4 + 7 * 2)
    assert first[1]["reasoning_gym"] == {"task": "leg_counting", "size": 3, "seed": 7, "index": 1}


def test_scores_of_answers() -> None:
    origin = rows()[1]["reasoning_gym"]
    texts = ["118", "<think>119</think> <answer> 118 </answer>", "<answer>118</answer><answer>3</answer>", ""]
    assert [score_answer(text, origin) for text in texts] == [1.0, 1.0, 0.0, 0.0]


def test_reward_of_a_recipe_scores_in_a_sandbox() -> None:
    question = rows()[1]
    reward = build_reward(
        make_spec(rewards=[{"type": "reasoning_gym", "timeout_seconds": 60}]).rewards[0], {}, ComputeSpec()
    )
    rollouts = make_rollouts([["<answer>118</answer>", "7"]], columns=[question])
    assert RewardSet([reward]).score(rollouts, where="step 1").total.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reasoning_gym:leg_countin", "reasoning-gym has no task 'leg_countin' (did you mean 'leg_counting'?)"),
        ("reasoning_gym:leg_counting?sise=3", "unknown sise; expected reasoning_gym:TASK?size=1000&seed=0"),
        ("reasoning_gym:leg_counting?seed=x", "size and seed are whole numbers"),
        ("reasoning_gym:leg_counting?size=0", "size is 1 to 1,000,000"),
        ("reasoning_gym:leg_counting?size=1000001", "size is 1 to 1,000,000"),
    ],
)
def test_task_that_cannot_be_made(path: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        rows(path)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    load_reasoning_gym.cache_clear()
    with pytest.raises(ConfigError, match=re.escape("pip install 'dar-rlhf[reasoning-gym]'")):
        load_reasoning_gym()
