"""Several rewards as one number per completion: the weighted sum of those that apply."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.handmade import make_rollouts

from dar.config.reward import RewardSpec
from dar.errors import RewardError
from dar.rewards import Failed, Reward, RewardSet, builtin, join_tables

ROLLOUTS = make_rollouts([["a", "bb"], ["ccc", "dddd"]], columns=[{"answer": "x"}, {"answer": "y"}])
DOUBLE = RewardSpec(weight=2.0)


def constant(*values: float | None) -> Any:
    return lambda completions: list(values)


def test_total_is_the_weighted_sum():
    rewards = RewardSet(
        [
            Reward("one", constant(1, 2, 3, 4), DOUBLE),
            Reward("two", constant(10, 0, -10, 0), RewardSpec(weight=-0.5)),
        ]
    )
    table = rewards.score(ROLLOUTS, where="step 1")
    # 2·(1, 2, 3, 4) − 0.5·(10, 0, −10, 0)
    assert table.total.tolist() == [[-3.0, 4.0], [11.0, 8.0]]
    assert table.total.dtype == torch.float32
    assert table.parts["two"].tolist() == [[10.0, 0.0], [-10.0, 0.0]]


def test_reward_that_does_not_apply_adds_nothing():
    rewards = RewardSet([Reward("one", constant(1, None, 3, None)), Reward("two", constant(None, 5, 6, 7), DOUBLE)])
    table = rewards.score(ROLLOUTS, where="step 1")
    assert table.total.tolist() == [[1.0, 10.0], [15.0, 14.0]]
    assert math.isnan(table.parts["one"][0, 1])
    assert table.metrics()["rewards/one/mean"] == 2.0  # over rows 0 and 2
    assert table.metrics()["rewards/two/mean"] == 6.0  # over rows 1, 2 and 3
    # 1 and 3: sample variance ((−1)² + 1²) / 1
    assert table.metrics()["rewards/one/std"] == pytest.approx(math.sqrt(2))


def test_reward_that_applies_nowhere_has_no_metrics():
    rewards = RewardSet([Reward("one", constant(1, 2, 3, 4)), Reward("never", constant(None, None, None, None))])
    table = rewards.score(ROLLOUTS, where="step 1")
    own = {"rewards/one/mean", "rewards/one/std"}
    assert table.metrics().keys() == {"reward", "reward_std", "frac_reward_zero_std"} | own
    assert table.total.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_completion_no_reward_applies_to_is_refused():
    rewards = RewardSet([Reward("one", constant(1, 1, None, 1)), Reward("two", constant(1, None, None, 1))])
    with pytest.raises(RewardError, match=r"no reward applies to row 2 at step 7: all returned None.*was: ccc$"):
        rewards.score(ROLLOUTS, where="step 7")


def test_failing_reward_is_named_among_the_others():
    rewards = RewardSet([Reward("fine", constant(1, 2, 3, 4)), Reward("broken", constant(1, 2, 3))])
    with pytest.raises(RewardError, match="reward 'broken' returned 3 values at step 7; expected 4 numbers"):
        rewards.score(ROLLOUTS, where="step 7")


def test_without_rewards_no_completion_has_one_and_nothing_is_said_of_any():
    table = RewardSet([]).score(ROLLOUTS, where="step 1")
    assert table.total.isnan().tolist() == [[True, True], [True, True]]
    assert (table.parts, table.metrics()) == ({}, {})
    assert join_tables([table, table]).total.isnan().tolist() == [[True, True]] * 4


def test_metrics_are_mean_and_sample_deviation():
    metrics = RewardSet([Reward("one", constant(1, 2, 3, 6))]).score(ROLLOUTS, where="step 1").metrics()
    # mean 3; deviations −2, −1, 0, 3: sample variance 14 / 3; in the groups (1, 2) and (3, 6) it is 1/2 and 9/2
    assert metrics["reward"] == metrics["rewards/one/mean"] == 3.0
    assert metrics["reward_std"] == pytest.approx((math.sqrt(0.5) + math.sqrt(4.5)) / 2)
    assert metrics["rewards/one/std"] == pytest.approx(math.sqrt(14 / 3))


# --- what the functions see ------------------------------------------------------------------------------------------


def seen_by_a_reward(rollouts: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def look(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0] * len(arguments["completions"])

    RewardSet([Reward("look", look)]).score(rollouts, where="step 1")
    return seen


def test_functions_see_one_entry_per_completion_in_row_order():
    seen = seen_by_a_reward(ROLLOUTS)
    assert seen["prompts"] == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert seen["completions"] == ["a", "bb", "ccc", "dddd"]
    assert seen["completion_ids"] == [[97], [98, 98], [99, 99, 99], [100, 100, 100, 100]]
    assert seen["finish_reasons"] == ["eos"] * 4
    assert seen["answer"] == ["x", "x", "y", "y"]


def test_conversations_get_their_completions_as_messages():
    messages = [{"role": "user", "content": "hi"}]
    seen = seen_by_a_reward(make_rollouts([["a"], ["b"]], contents=[messages, "plain"]))
    assert seen["prompts"] == [messages, "plain"]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], "b"]


def test_columns_cannot_hide_what_every_function_is_promised():
    seen = seen_by_a_reward(make_rollouts([["a"]], columns=[{"completions": ["not this"], "prompts": None}]))
    assert seen["completions"] == ["a"]
    assert seen["prompts"] == ["prompt 0"]


@pytest.mark.parametrize(
    "columns",
    [
        [{"answer": "x"}, {}],
        [{}, {"answer": "x"}],
    ],
    ids=["missing in the second row", "missing in the first row"],
)
def test_column_that_some_rows_lack_is_none_there(columns: list[dict[str, Any]]):
    seen = seen_by_a_reward(make_rollouts([["a"], ["b"]], columns=columns))
    assert seen["answer"] == [row.get("answer") for row in columns]


def test_builtin_rewards_are_combined_by_what_they_name():
    tenfold = RewardSpec(weight=10.0)
    rewards = RewardSet([Reward("length", builtin.length(2)), Reward("regex", builtin.regex("c"), tenfold)])
    # −|n − 2| / 2 for n = 1, 2, 3, 4, and 10 where there is a c
    assert rewards.score(ROLLOUTS, where="step 1").total.tolist() == [[-0.5, 0.0], [9.5, -1.0]]


# --- scores that are not to be had -----------------------------------------------------------------------------------


def failing(*values: float | Failed) -> Any:
    return lambda completions: list(values)


def test_a_failed_score_stops_the_run_unless_it_may_be_dropped():
    rewards = RewardSet([Reward("judge", failing(1.0, Failed("no answer in 30 s"), 3.0, 4.0))])
    expected = (
        r"reward 'judge' failed for 1 of 4 completions at step 7 \(on_failure: drop would leave them out\)\. "
        r"The first, row 1: no answer in 30 s\. Its completion was: bb$"
    )
    with pytest.raises(RewardError, match=expected):
        rewards.score(ROLLOUTS, where="step 7")


def test_a_dropped_completion_has_no_reward_whatever_the_others_say():
    judge = Reward(
        "judge",
        failing(1.0, Failed("away"), 3.0, 4.0),
        RewardSpec(weight=2.0, on_failure="drop", max_failed_share=0.25),
    )
    table = RewardSet([judge, Reward("other", constant(10, 20, None, 40))]).score(ROLLOUTS, where="step 7")
    assert table.total[~table.total.isnan()].tolist() == [12.0, 6.0, 48.0]
    assert math.isnan(table.total[0, 1])
    metrics = table.metrics()
    assert metrics["rewards/judge/failed_fraction"] == 0.25
    assert metrics["reward"] == 22.0
    # The first group has one reward left, and so no spread; the second's are 42 apart.
    assert metrics["reward_std"] == pytest.approx(42 / math.sqrt(2) / 2)
    assert metrics["rewards/judge/mean"] == pytest.approx(8 / 3)


def test_more_failures_than_allowed_stop_the_run():
    judge = Reward("judge", failing(1.0, Failed("away"), 3.0, 4.0), RewardSpec(on_failure="drop", max_failed_share=0.2))
    with pytest.raises(RewardError, match=r"failed for 1 of 4 .*, more than max_failed_share 0\.2 allows\. The first"):
        RewardSet([judge]).score(ROLLOUTS, where="step 7")


# --- asynchronous rewards --------------------------------------------------------------------------------------------


def test_an_asynchronous_reward_runs_while_the_caller_goes_on():
    asked, answered = threading.Event(), threading.Event()

    async def judge(completions: list[str]) -> list[float]:
        asked.set()
        await asyncio.to_thread(answered.wait, 60)
        return [1.0] * len(completions)

    def plain(completions: list[str]) -> list[float]:
        assert asked.wait(60)  # begun before the plain ones, though named after them
        return [2.0] * len(completions)

    scoring = RewardSet([Reward("plain", plain), Reward("judge", judge)]).start(ROLLOUTS, where="step 1")
    answered.set()  # what the caller does meanwhile
    table = scoring.finish()
    assert list(table.parts) == ["plain", "judge"]
    assert table.total.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_a_client_keeps_its_event_loop_from_step_to_step():
    loops: list[Any] = []

    class Judge:
        async def __call__(self, completions: list[str]) -> list[float]:
            loops.append(asyncio.get_running_loop())
            return [0.0] * len(completions)

    rewards = RewardSet([Reward("judge", Judge())])
    for step in (1, 2):
        rewards.score(ROLLOUTS, where=f"step {step}")
    assert loops[0] is loops[1]


def test_a_failing_reward_gives_up_the_ones_on_their_way():
    cancelled = threading.Event()

    async def judge(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="reward 'broken' returned 3 values"):
        RewardSet([Reward("broken", constant(1, 2, 3)), Reward("judge", judge)]).score(ROLLOUTS, where="step 7")
    assert cancelled.wait(60)


# --- what a reward does to the others: nothing -----------------------------------------------------------------------


def test_a_reward_that_edits_what_it_is_given_spoils_no_other():
    rollouts = make_rollouts([["a", "bb"], ["ccc", "dddd"]], columns=[{"tests": ["x"]}, {"tests": ["y"]}])

    def spoil(prompts: Any, completions: list[Any], tests: list[list[str]], **columns: Any) -> list[float]:
        completions[:] = [""] * len(completions)
        for row in tests:
            row.append("z")
        return [float(len(row)) for row in tests]

    def measure(completions: list[str], tests: list[list[str]]) -> list[float]:
        return [float(len(text) + 10 * len(row)) for text, row in zip(completions, tests, strict=True)]

    for _ in range(2):
        rewards = RewardSet([Reward("spoil", spoil), Reward("measure", measure), Reward("again", spoil)])
        table = rewards.score(rollouts, where="step 1")
        assert table.parts["measure"].tolist() == [[11.0, 12.0], [13.0, 14.0]]
        # Completions of one prompt have its column each for themselves.
        assert table.parts["spoil"].tolist() == table.parts["again"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [prompt.columns for prompt in rollouts.prompts] == [{"tests": ["x"]}, {"tests": ["y"]}]


def test_a_reward_that_cannot_be_looked_at_or_reports_with_an_exit_is_named():
    class Hidden:
        def __getattribute__(self, name: str) -> Any:
            raise KeyboardInterrupt(name)

        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

    class Leaving(Counting):
        def metrics(self) -> dict[str, float]:
            raise SystemExit(7)

    with pytest.raises(RewardError, match="reward 'hidden' raised KeyboardInterrupt before it was called: __"):
        RewardSet([Reward("hidden", Hidden())]).score(ROLLOUTS, where="step 7")
    with pytest.raises(RewardError, match=r"^reward 'leaving' raised SystemExit in metrics\(\) at step 7: 7 \(.*, "):
        RewardSet([Reward("leaving", Leaving())]).score(ROLLOUTS, where="step 7")


# --- what rewards say beside their scores ----------------------------------------------------------------------------


class Counting:
    """Counts its calls, as a number that a checkpoint keeps."""

    def __init__(self) -> None:
        self.calls = 0.0

    def __call__(self, completions: list[str]) -> list[float]:
        self.calls += 1
        return [0.0] * len(completions)

    def metrics(self) -> dict[str, float]:
        return {"calls": self.calls}

    def state(self) -> dict[str, float]:
        return {"calls": self.calls}

    def restore(self, state: Mapping[str, float]) -> None:
        assert state.keys() == {"calls"}, "nothing of another reward's"
        self.calls = state["calls"]


def test_what_a_reward_reports_is_logged_under_its_name():
    table = RewardSet([Reward("one", Counting()), Reward("two", Counting())]).score(ROLLOUTS, where="step 1")
    assert table.metrics()["rewards/one/calls"] == 1.0


def test_state_goes_into_a_checkpoint_and_comes_back():
    one, two = Counting(), Counting()
    rewards = RewardSet([Reward("one", one), Reward("two", two), Reward("plain", constant(1, 2, 3, 4))])
    one.calls, two.calls = 3.0, 5.0
    state = rewards.state()
    assert state == {"one.calls": 3.0, "two.calls": 5.0}
    one.calls = two.calls = 0.0
    rewards.restore(state)
    assert (one.calls, two.calls) == (3.0, 5.0)
