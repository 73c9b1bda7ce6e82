"""What reward functions log, as they do under TRL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.handmade import make_rollouts
from transformers import TrainerState

from dar.errors import RewardError
from dar.record.completions import extra_columns
from dar.rewards import Reward, RewardSet, check_signature, group_reward, join_tables
from dar.rewards.function import LOGGING


def test_what_a_function_logs_is_kept_by_name_and_only_those_that_name_it_are_given_it():
    seen: dict[str, Any] = {}

    async def named(completions: list[str], log_extra: Any, log_metric: Any, trainer_state: Any, **columns: Any):
        log_extra("first", [text[0] for text in completions])
        log_extra("odd", [1, "two", None, 4.0])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        seen.update(step=trainer_state.global_step, last=trainer_state.max_steps, columns=set(columns))
        return [1.0] * len(completions)

    def unnamed(completions: list[str], **columns: Any):
        assert not columns.keys() & set(LOGGING)
        return [0.0] * len(completions)

    check_signature(named, "named", [])
    state = TrainerState(global_step=6, max_steps=9)
    rollouts = make_rollouts([["a", "bb"], ["ccc", "dddd"]])
    rewards = RewardSet([Reward("named", named), Reward("unnamed", unnamed)])
    table = rewards.score(rollouts, where="step 7", state=state)
    assert seen == {"step": 6, "last": 9, "columns": {"prompts", "completion_ids", "finish_reasons", "group_ids"}}
    assert table.extra == {"named/first": ["a", "b", "c", "d"], "named/odd": [1, "two", None, 4.0]}
    assert extra_columns(table)["extra/named/odd"] == ["1", "two", None, "4.0"]
    assert table.metrics()["rewards/named/share"] == 0.5
    # Of two ranks the mean is that of all calls, and a column that one of them has not is empty there.
    silent = replace(table, logged={"rewards/named/share": [0.2]}, extra={})
    both = join_tables([silent, table])
    assert both.extra["named/first"] == [None] * 4 + ["a", "b", "c", "d"]
    assert both.metrics()["rewards/named/share"] == pytest.approx((0.2 + 0.25 + 0.75) / 3)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda extra, metric: extra("x", [1]), r"log_extra\('x'\) of reward 'bad' got 1 values at step 1; expected 4"),
        (lambda extra, metric: metric("mean", 1.0), r"log_metric\('mean'\): every reward has a metric of that name"),
        (lambda extra, metric: metric("x", "much"), "reward 'bad' raised ValueError at step 1: could not convert"),
    ],
)
def test_what_cannot_be_logged_is_refused(log: Any, message: str):
    def bad(completions: list[str], log_extra: Any, log_metric: Any):
        log(log_extra, log_metric)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=message):
        RewardSet([Reward("bad", bad)]).score(make_rollouts([["a", "bb"], ["ccc", "dddd"]]), where="step 1")


def test_a_group_reward_logs_nothing():
    with pytest.raises(TypeError, match="group_reward has no log_extra: a reward of the whole batch"):
        group_reward(lambda completions, log_extra: [0.0])
