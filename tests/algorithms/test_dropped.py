"""A completion without a reward is as if it had never been sampled: in every statistic, weight and denominator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import assert_close, make_scored, random_rewards, random_rows
from support.flows import FLOW_METHODS

from dar.algorithms.squared import OPTIMAL_VALUE
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch
from dar.config.algorithms import ALGORITHM_SPECS
from dar.config.regression import DARSpec, TargetESSSpec

NAN = float("nan")
ONLINE: list[Any] = [spec for name, spec in ALGORITHM_SPECS.items() if not spec.logged and name not in FLOW_METHODS]


def scored_batches() -> tuple[Batch, Batch]:
    """Four prompts with four completions, of which each second has no reward; and the same without these."""
    _, old, ref = random_rows(0, 16)
    rewards = [[abs(reward) for reward in group] for group in random_rewards(1, 4, 4)]  # MaxRL takes no others
    full = make_scored(
        [[reward if index % 2 else NAN for index, reward in enumerate(group)] for group in rewards], old, ref
    )
    small = make_scored([group[1::2] for group in rewards], old[1::2], ref[1::2])
    values = torch.linspace(-1, 1, 16 * full.mask.shape[1]).reshape(16, -1) * full.mask
    width = small.mask.shape[1]
    known = [{OPTIMAL_VALUE: torch.arange(4.0).unsqueeze(1).expand_as(each.rewards)} for each in (full, small)]
    return (
        replace(full, values=values, labels=known[0]),
        replace(small, values=values[1::2, :width], labels=known[1]),
    )


@pytest.mark.parametrize("spec", ONLINE, ids=lambda spec: spec.model_fields["type"].default)
def test_dropped_completions_count_nowhere(spec: Any):
    full, small = scored_batches()
    weighted, metrics = build_algorithm(spec(), max_completion_length=8).weigh(full.rewarded())
    expected, expected_metrics = build_algorithm(spec(), max_completion_length=8).weigh(small)
    assert metrics == pytest.approx(expected_metrics)
    assert weighted.denominator == expected.denominator
    assert_close(weighted.weights, expected.weights.tolist(), rtol=1e-6)
    assert_close(weighted.advantages, expected.advantages.tolist(), rtol=1e-5, atol=1e-6)
    for name, tokens in expected.tokens.items():
        assert_close(weighted.tokens[name], tokens.tolist(), rtol=1e-5, atol=1e-6)
    # In a table of the whole batch they keep their places.
    table = weighted.to_table(weighted.weights, absent=0.0)
    assert (table[:, 0::2] == 0).all()
    assert torch.equal(table[:, 1::2].flatten(), weighted.weights)


def test_adaptive_beta_sees_only_what_was_scored():
    full, small = scored_batches()
    spec = DARSpec(beta=TargetESSSpec(target_ess=0.5))
    found = [build_algorithm(spec, max_completion_length=8).weigh(each)[1] for each in (full.rewarded(), small)]
    assert found[0]["weights/beta"] == pytest.approx(found[1]["weights/beta"])


@pytest.mark.parametrize("spec", ONLINE, ids=lambda spec: spec.model_fields["type"].default)
def test_a_group_without_any_reward_and_one_with_a_single_one(spec: Any):
    full, _ = scored_batches()
    rewards = full.rewards.clone()
    rewards[0] = NAN
    rewards[1, :3] = NAN
    weighted, _ = build_algorithm(spec(), max_completion_length=8).weigh(replace(full, rewards=rewards).rewarded())
    assert weighted.groups.group_sizes == (1, 2, 2)
    assert weighted.weights.isfinite().all()
    assert weighted.advantages.isfinite().all()


def test_nothing_changes_where_every_completion_has_a_reward():
    _, small = scored_batches()
    assert small.rewarded() is small


def test_table_and_rows():
    full, _ = scored_batches()
    scored = full.rewarded()
    rows = scored.to_rows(scored.rewards)
    assert rows.tolist() == [reward for group in full.rewards.tolist() for reward in group[1::2]]
    assert torch.equal(scored.to_table(rows).nan_to_num(9.0), full.rewards.nan_to_num(9.0))
    assert torch.equal(scored.has_eos, full.has_eos[1::2])
