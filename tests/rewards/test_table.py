"""Clipping, thresholds, standardisation and weights; tables of several ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.handmade import make_rollouts

from dar.config.reward import RewardSpec
from dar.rewards import Reward, RewardSet, RewardTable, join_tables
from dar.rewards.table import contribution

NAN = math.nan
CLIPPED = RewardSpec(clip=[0.0, 0.5])
STANDARDIZED = RewardSpec(weight=2.0, standardize=True)


def shaped(values: list[float], **spec: Any) -> list[float]:
    return contribution(RewardSpec(**spec), torch.tensor(values)).tolist()


def test_clip_and_threshold_come_before_the_weight() -> None:
    assert shaped([-3, 0.5, 7], weight=2.0, clip=[-1, 1]) == [-2.0, 1.0, 2.0]
    # The threshold itself counts as reached.
    assert shaped([0.4, 0.5, 7], weight=-3.0, threshold=0.5) == [0.0, -3.0, -3.0]


def test_standardised_over_the_values_there_are() -> None:
    found = shaped([1, NAN, 3, 5], weight=2.0, standardize=True)
    # Mean 3, population variance (4 + 0 + 4) / 3.
    spread = math.sqrt(8 / 3)
    assert found[0] == pytest.approx(-4 / spread, rel=1e-12)
    assert math.isnan(found[1])
    assert found[2:] == [0.0, pytest.approx(4 / spread, rel=1e-12)]


def test_equal_values_standardise_to_exactly_zero() -> None:
    # 0.1 + 0.1 + 0.1 is not 0.3: without the special case this would be ±∞ or noise.
    assert shaped([0.1, 0.1, 0.1], standardize=True) == [0.0, 0.0, 0.0]
    found = shaped([NAN, 7.0], standardize=True)
    assert math.isnan(found[0])
    assert found[1] == 0.0
    assert all(map(math.isnan, shaped([NAN, NAN], standardize=True)))


def test_clip_is_before_standardisation() -> None:
    assert shaped([-1000, 0, 1], clip=[0, 1], standardize=True) == pytest.approx(
        # 0, 0, 1: mean 1/3, variance 2/9
        [-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)]
    )


def test_threshold_leaves_what_does_not_apply_alone() -> None:
    assert math.isnan(shaped([NAN], threshold=0.5)[0])


def two_rewards() -> RewardSet:
    return RewardSet(
        [
            Reward("length", lambda completion_ids: [len(ids) for ids in completion_ids], STANDARDIZED),
            Reward(
                "a",
                lambda completions: [None if "b" in text else 1.0 for text in completions],
                CLIPPED,
            ),
        ]
    )


def test_parts_stay_raw_and_contributions_are_what_adds_up() -> None:
    table = two_rewards().score(make_rollouts([["a", "bbb"]]), where="step 1")
    assert table.parts["length"].tolist() == [[1.0, 3.0]]
    assert table.contributions["length"].tolist() == [[-2.0, 2.0]]
    assert table.contributions["a"][0, 0] == 0.5
    assert math.isnan(table.contributions["a"][0, 1])
    assert table.total.tolist() == [[-1.5, 2.0]]
    assert table.metrics()["rewards/length/mean"] == 2.0
    assert table.metrics()["rewards/a/mean"] == 1.0


def test_ranks_standardise_over_the_global_batch() -> None:
    groups = [["a", "bbb"], ["aa", "aaaaaaa"], ["b", "b"], ["a", "cccc"]]
    whole = two_rewards().score(make_rollouts(groups), where="step 1")
    ranks = [two_rewards().score(make_rollouts(part), where="step 1") for part in (groups[:2], groups[2:])]
    joined = join_tables(ranks)
    assert torch.equal(joined.total, whole.total)
    assert joined.metrics() == whole.metrics()
    # Each by itself would have been something else.
    assert not torch.allclose(torch.cat([rank.total for rank in ranks]), whole.total)


def test_joined_tables_keep_failures_and_logged_rewards() -> None:
    failed = RewardTable(torch.tensor([[NAN, 1.0]]), {"one": torch.tensor([[NAN, 1.0]])}, {}, {}, {"one": RewardSpec()})
    assert torch.equal(join_tables([failed, failed]).total.isnan(), torch.tensor([[True, False]] * 2))
    shares = [
        RewardTable(torch.ones(1, 2), {}, {"rewards/j/failed_fraction": x, "rewards/j/requests": x}) for x in (0.5, 0)
    ]
    assert join_tables(shares).reported == {"rewards/j/failed_fraction": 0.25, "rewards/j/requests": 0.5}
    logged = RewardTable(torch.tensor([[3.0, 1.0]]))
    assert join_tables([logged, logged]).total.tolist() == [[3.0, 1.0], [3.0, 1.0]]
