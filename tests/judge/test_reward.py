"""Rewards made of a judge."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from support.scripted_judge import ScriptedJudge, between, refused, said, user_text
from test_judge import length_script, make_judge, prefers_longer

from dar.algorithms.preference import pair_roles
from dar.errors import RewardError
from dar.judge import ScoreReward, WinsReward
from dar.judge.reward import group_pairs
from dar.rewards import Failed


def call(reward: ScoreReward | WinsReward, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
    """As a reward function is called: by keyword, with everything."""
    rows = len(prompts)
    groups = [prompts.index(prompt) for prompt in prompts]
    always = {"completion_ids": [[1]] * rows, "finish_reasons": ["eos"] * rows, "group_ids": groups}
    return asyncio.run(reward(prompts=prompts, completions=completions, **(always | columns)))


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_scores_of_conversations():
    with ScriptedJudge(length_script) as server:
        reward = ScoreReward(make_judge(server.url))
        prompt = [{"role": "user", "content": "say a"}]
        assert call(reward, [prompt, prompt], [message("aa"), message("aaaa")]) == [2.0, 4.0]
    assert {between(user_text(body), "prompt") for body in server.bodies} == {"say a"}


def test_a_failed_score_is_never_a_number():
    script = lambda body, before: refused(400, "no") if "bad" in user_text(body) else said("7")  # noqa: E731
    with ScriptedJudge(script) as server:
        scores = call(ScoreReward(make_judge(server.url)), ["p", "p"], ["bad", "good"])
    assert scores == [Failed("the judge refused the request: 400: no"), 7.0]


def test_rubrics_of_the_rows():
    with ScriptedJudge(lambda body, before: said("7")) as server:
        reward = ScoreReward(make_judge(server.url, rubric_column="wanted"))
        call(reward, ["p", "q"], ["a", "b"], wanted=["be brief", None])
        with pytest.raises(RewardError, match=r"the data have no column 'wanted', .*; there are: kind"):
            call(reward, ["p"], ["a"], kind=["x"])
    texts = sorted(user_text(body) for body in server.bodies)
    assert ["be brief" in text for text in texts].count(True) == 1
    assert ["rubric" in text for text in texts].count(True) == 1


def test_metrics_are_drained():
    tokens = [("7", {"7": -0.5, "x": -1.0})]
    with ScriptedJudge(lambda body, before: said("7", tokens)) as server:
        reward = ScoreReward(make_judge(server.url))
        call(reward, ["p", "p"], ["a", "a"])
    found = reward.metrics()
    assert found["requests"] == 1
    assert found["score_mass"] == pytest.approx(0.60653, abs=1e-5)  # e^−0.5
    assert "score_mass" not in reward.metrics()
    assert reward.metrics()["requests"] == 0


def test_the_budget_goes_on_where_it_was():
    with ScriptedJudge(length_script) as server:
        reward = ScoreReward(make_judge(server.url, budget={"requests": 3}))
        call(reward, ["p", "p"], ["a", "aa"])
        assert reward.state() == {"requests": 2, "tokens": 220}
        resumed = ScoreReward(make_judge(server.url, budget={"requests": 3}))
        resumed.restore(reward.state())
        with pytest.raises(RewardError, match="2 were made, 2 more are due"):
            call(resumed, ["p", "p"], ["aaa", "aaaa"])
        # A judge that was not there yet.
        resumed.restore({})
        assert resumed.state() == {"requests": 0, "tokens": 0}


def test_pairs_of_a_group():
    assert group_pairs(range(2, 5), "all") == [(2, 3), (2, 4), (3, 4)]
    assert group_pairs(range(2, 5), "first") == [(2, 3), (2, 4)]


def test_shares_of_wins():
    # By length: 3 beats 2 and 1; 2 beats 1; the two of length 2 tie. Shares of three comparisons each.
    with ScriptedJudge(prefers_longer) as server:
        reward = WinsReward(make_judge(server.url, "pairwise"))
        shares = call(reward, ["p"] * 4, ["aaa", "aa", "a", "bb"])
    assert shares == [1.0, pytest.approx(1.5 / 3), 0.0, pytest.approx(1.5 / 3)]
    assert len(server.bodies) == 6 * 2
    found = reward.metrics()
    assert found["tied_fraction"] == pytest.approx(1 / 6)
    assert found["disagreement"] == 0
    assert found["first_shown_wins"] == 0.5


def test_against_the_first_of_the_group_only():
    with ScriptedJudge(prefers_longer) as server:
        reward = WinsReward(make_judge(server.url, "pairwise", opponents="first"))
        assert call(reward, ["p"] * 3, ["aa", "a", "aaa"]) == [0.5, 0.0, 1.0]
    assert len(server.bodies) == 2 * 2


def test_a_prompt_that_comes_twice_is_two_groups():
    with ScriptedJudge(prefers_longer) as server:
        reward = WinsReward(make_judge(server.url, "pairwise"))
        shares = call(reward, ["p"] * 4, ["a", "aa", "aaa", "aaaa"], group_ids=[0, 0, 1, 1])
    assert shares == [0.0, 1.0, 0.0, 1.0]
    assert len(server.bodies) == 2 * 2


def test_equal_completions_tie_without_asking():
    with ScriptedJudge(prefers_longer) as server:
        reward = WinsReward(make_judge(server.url, "pairwise"))
        assert call(reward, ["p", "p", "q", "q"], ["a", "a", "b", "bb"]) == [0.5, 0.5, 0.0, 1.0]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(("said_first", "signs"), [("longer", [1.0, -1.0]), ("A", [0.0, 0.0])])
def test_with_two_completions_the_pair_is_the_judges(said_first: str, signs: list[float]):
    script = prefers_longer if said_first == "longer" else lambda body, before: said("A")
    with ScriptedJudge(script) as server:
        shares = call(WinsReward(make_judge(server.url, "pairwise")), ["p", "p"], ["aa", "a"])
    assert pair_roles(torch.tensor([shares])).tolist() == [signs]


def test_failed_comparisons_are_left_out_and_none_left_is_a_failure():
    # Whatever is compared with "bad" fails: the others still have each other.
    script = lambda body, before: refused(400, "no") if "bad" in user_text(body) else prefers_longer(body, before)  # noqa: E731
    with ScriptedJudge(script) as server:
        reward = WinsReward(make_judge(server.url, "pairwise"))
        shares = call(reward, ["p"] * 3 + ["q"], ["aa", "bad", "a", "alone"])
    failed = Failed("the judge refused the request: 400: no")
    assert shares == [1.0, failed, 0.0, Failed("there is no other completion of its prompt to compare it with")]


def test_scales_reach_the_judge():
    with ScriptedJudge(lambda body, before: said("0" if "from 0 (useless) to 5" in user_text(body) else "9")) as server:
        assert call(ScoreReward(make_judge(server.url, scale=[0, 5])), ["p"], ["a"]) == [0.0]
