"""Rewards that see a prompt's completions together."""

from __future__ import annotations

from typing import Any

import pytest
from support.handmade import make_rollouts

from dar.errors import RewardError
from dar.rewards import Reward, RewardSet, group_reward
from dar.rewards.builtin import diversity


def total(function: Any, rollouts: Any) -> list[list[float]]:
    return RewardSet([Reward("group", function)]).score(rollouts, where="step 1").total.tolist()


def test_function_is_called_once_per_prompt_with_that_prompts_rows() -> None:
    seen: list[dict[str, Any]] = []

    @group_reward
    def score(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, "answer": answer})
        return [float(len(seen)), 0.0]

    # Two prompts with the same text are two groups.
    rollouts = make_rollouts([["a", "b"], ["c", "d"]], contents=["p", "p"], columns=[{"answer": "x"}, {"answer": "y"}])
    assert total(score, rollouts) == [[1.0, 0.0], [2.0, 0.0]]
    assert seen == [
        {"prompts": ["p", "p"], "completions": ["a", "b"], "answer": ["x", "x"]},
        {"prompts": ["p", "p"], "completions": ["c", "d"], "answer": ["y", "y"]},
    ]


def test_wrong_number_of_values_is_refused() -> None:
    score = group_reward(lambda completions: [0.0])
    with pytest.raises(RewardError, match="1 values for the 2 completions of group 0"):
        total(score, make_rollouts([["a", "b"]]))


def test_asynchronous_function_is_refused() -> None:
    async def score(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match="takes a plain function"):
        group_reward(score)  # pyright: ignore[reportArgumentType]


def test_diversity_is_the_share_of_ngrams_no_other_completion_has() -> None:
    groups = [["the red house stands", "The red house, here", "red"], ["same words here", "same words here", "x y"]]
    # Pairs: {the red, red house, house stands}, {the red, red house, house here}, {}: one of three is its own.
    assert total(diversity(2), make_rollouts(groups)) == [
        [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0],
        [0.0, 0.0, 1.0],
    ]


def test_words_said_for_another_prompt_do_not_count() -> None:
    assert total(diversity(1), make_rollouts([["a", "b"], ["a", "b"]])) == [[1.0, 1.0], [1.0, 1.0]]
