"""From a recipe's lines to a reward: keys, defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.handmade import make_rollouts, make_spec

from dar.assembly.reward import build_reward
from dar.config.run import ComputeSpec
from dar.errors import ConfigError
from dar.rewards import RewardSet


def built(**reward: Any) -> RewardSet:
    return RewardSet([build_reward(make_spec(rewards=[reward]).rewards[0], {}, ComputeSpec())])


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"type": "format", "tags": ["a"]}, [1.0, 0.0]),
        ({"type": "diversity", "ngram": 3}, [1.0, 0.0]),
        ({"type": "diversity", "ngram": 1}, [1.0, 1.0]),
        ({"type": "token_cost", "cost": 0.5}, [-4.0, -2.0]),
        ({"type": "length_penalty", "max_length": 8, "buffer": 4}, [-1.0, 0.0]),
        ({"type": "token_cost", "cost": 1, "clip": [-5, 0], "weight": 2}, [-10.0, -8.0]),
        ({"type": "token_cost", "cost": 1, "threshold": -4}, [0.0, 1.0]),
        ({"type": "token_cost", "cost": 1, "standardize": True}, [-1.0, 1.0]),
        ({"type": "sandboxed", "function": "support.verifiers:behave", "timeout_seconds": 60}, [8.0, 4.0]),
    ],
    ids=str,
)
def test_reward_of_a_recipe(reward: dict[str, Any], expected: list[float]) -> None:
    rollouts = make_rollouts([["<a>x</a>", "b, c"]], columns=[{"answer": ""}])
    assert built(**reward).score(rollouts, where="step 1").total.tolist() == [expected]


def test_ifeval_and_schema_of_a_recipe(tmp_path: Path) -> None:
    schema = tmp_path / "schema.yaml"
    schema.write_text("type: array\n")
    rollouts = make_rollouts(
        [["[1]", "[1, 2]"]], columns=[{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
    )
    assert built(type="ifeval").score(rollouts, where="step 1").total.tolist() == [[1.0, 0.0]]
    assert built(type="json_schema", path=str(schema)).score(rollouts, where="step 1").total.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"type": "format", "clip": [1, 0]}, r"clip is \[low, high\] with low < high"),
        ({"type": "format", "clip": [1]}, "at least 2 items"),
        ({"type": "format", "clip": [0, 1], "threshold": 1}, "clip and threshold exclude each other"),
        ({"type": "format", "tags": ["<think>"]}, "tags are different names without brackets"),
        ({"type": "format", "tags": ["a", "a"]}, "tags are different names without brackets"),
        ({"type": "length_penalty", "max_length": 4, "buffer": 5}, "buffer is 5, more than max_length 4"),
        ({"type": "sandboxed", "function": "nowhere"}, "expected 'package.module:function', got 'nowhere'"),
        ({"type": "math", "colum": "gold"}, r"unknown key 'colum' \(did you mean 'column'\?\)"),
    ],
    ids=str,
)
def test_reward_that_makes_no_sense_is_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_spec(rewards=[reward])
