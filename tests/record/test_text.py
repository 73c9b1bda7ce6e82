"""Statistics of sampled text, on samples small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.handmade import make_rollouts

from dar.record.text import reward_length_metrics, sampled_entropy, text_metrics, token_rows


def test_lengths_and_endings_have_trls_names():
    rollouts = make_rollouts(
        [["", ""], ["", ""]],
        ids=[[5, 0], [5, 5, 5, 5], [5, 5, 5, 5], [5, 6, 7, 0]],
        finish_reasons=["eos", "length", "length", "eos"],
    )
    assert text_metrics(rollouts) == {
        "completions/mean_length": 3.5,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/p95_length": 4.0,
        "completions/clipped_ratio": 0.5,
        # 14 tokens; different are 0, 5, 6 and 7
        "completions/distinct_1": pytest.approx(4 / 14),
        # 10 bigrams; different are 50, 55, 56, 67 and 70
        "completions/distinct_2": 0.5,
        # 6 trigrams; different are 555, 567 and 670
        "completions/distinct_3": 0.5,
        # rows two and three are one token over and over, the others repeat none
        "completions/repetition": 0.5,
        "completions/mean_terminated_length": 3.0,
        # group one, 50 and three times 55, shares nothing; group two, three times 55 and 56, 67, 70, neither
        "completions/group_overlap_2": 0.0,
    }


def test_p95_length_lies_between_the_two_longest_of_twenty():
    """The 0.95-quantile of 1, …, 20 at rank 0.95 · 19 = 18.05 (counting from 0), between 19 and 20."""
    rollouts = make_rollouts([[""] * 20], ids=[[7] * length for length in range(1, 21)])
    assert text_metrics(rollouts)["completions/p95_length"] == pytest.approx(19.05)


def test_group_overlap_is_averaged_over_the_groups_that_have_one():
    """Two alike, two unlike, and two too short for a bigram: (1 + 0) / 2."""
    rollouts = make_rollouts([[""] * 2] * 3, ids=[[1, 2], [1, 2], [1, 2], [3, 4], [1], [2]])
    assert text_metrics(rollouts)["completions/group_overlap_2"] == 0.5


def test_group_overlap_is_left_out_with_one_completion_per_prompt():
    assert "completions/group_overlap_2" not in text_metrics(make_rollouts([["ab"], ["ab"]]))


# --- reward and length -----------------------------------------------------------------------------------------------


def test_reward_that_is_the_length_is_explained_by_it():
    lengths = torch.tensor([1, 2, 3, 4])
    assert reward_length_metrics(2.0 * lengths.reshape(2, 2) - 1, lengths) == {
        "reward_length/pearson": pytest.approx(1.0),
        "reward_length/spearman": pytest.approx(1.0),
        "reward_length/r2_within": pytest.approx(1.0),
    }


def test_correlations_by_hand():
    """Lengths 1, 2, 3, 6 and rewards 1, 3, 2, 2.

    Deviations −2, −1, 0, 3 and −1, 1, 0, 0: Σ products 1, Σ squares 14 and 2, so r = 1/√28.
    Ranks 1, 2, 3, 4 and 1, 4, 2½, 2½: deviations −1½, −½, ½, 1½ and −1½, 1½, 0, 0; Σ products 1½, Σ squares 5 and 4½.
    Within the prompts (1, 2), (3, 6): deviations −½, ½, −1½, 1½ and −1, 1, 0, 0; Σ products 1, Σ squares 5 and 2, so
    r² = 1/10.
    """
    found = reward_length_metrics(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([1, 2, 3, 6]))
    assert found == {
        "reward_length/pearson": pytest.approx(1 / math.sqrt(28)),
        "reward_length/spearman": pytest.approx(1.5 / math.sqrt(5 * 4.5)),
        "reward_length/r2_within": pytest.approx(1 / 10),
    }


def test_length_that_differs_between_prompts_only_explains_nothing_within():
    """Prompts that ask for more earn more, but among a prompt's completions all lengths are equal."""
    found = reward_length_metrics(torch.tensor([[1.0, 1.1], [5.0, 5.1]]), torch.tensor([2, 2, 9, 9]))
    assert found["reward_length/pearson"] > 0.99
    assert "reward_length/r2_within" not in found


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [
        ([[0.1] * 3] * 2, [1, 2, 3, 4, 5, 6]),  # all rewards equal (and 0.1 not exact in binary)
        ([[0.1, 0.2, 0.3]] * 2, [4] * 6),
        ([[0.7]], [4]),
    ],
)
def test_no_correlation_is_no_metric(rewards: list[list[float]], lengths: list[int]):
    assert reward_length_metrics(torch.tensor(rewards), torch.tensor(lengths)) == {}


def test_completions_without_a_reward_are_left_out():
    """Rewards r = T of those that have one; the lengths of the two others would spoil it."""
    rewards = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.nan, 6.0]])
    found = reward_length_metrics(rewards, torch.tensor([1, 2, 90, 4, 99, 6]))
    assert found == {
        "reward_length/pearson": pytest.approx(1.0),
        "reward_length/spearman": pytest.approx(1.0),
        "reward_length/r2_within": pytest.approx(1.0),
    }
    nothing = torch.full((1, 3), math.nan)
    assert reward_length_metrics(torch.cat((nothing, rewards)), torch.tensor([7, 8, 9, 1, 2, 90, 4, 99, 6])) == found


def test_rewards_equal_within_each_prompt_have_no_share_within():
    found = reward_length_metrics(torch.tensor([[0.1] * 3, [0.3] * 3]), torch.tensor([1, 2, 3, 4, 5, 6]))
    assert found.keys() == {"reward_length/pearson", "reward_length/spearman"}


def test_mean_terminated_length_is_left_out_when_none_ended():
    rollouts = make_rollouts([["", ""]], ids=[[5], [5, 5]], finish_reasons=["length", "length"])
    metrics = text_metrics(rollouts)
    assert "completions/mean_terminated_length" not in metrics
    assert metrics["completions/clipped_ratio"] == 1.0


def test_token_rows_leave_the_padding_out():
    assert token_rows(make_rollouts([["", ""]], ids=[[5, 0], [5, 6, 7, 0]])) == [[5, 0], [5, 6, 7, 0]]


def test_entropy_is_averaged_over_tokens_and_not_over_rows():
    rollouts = make_rollouts([["", ""]], ids=[[5], [5, 5, 5]], logprobs=[[-4.0], [-1.0, -2.0, -1.0]])
    assert sampled_entropy(rollouts) == 2.0
