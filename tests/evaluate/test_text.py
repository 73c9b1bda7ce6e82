"""Statistics of sampled text, on samples small enough to count by hand."""

from __future__ import annotations

import pytest
from handmade import make_rollouts
from hypothesis import given
from hypothesis import strategies as st

from dar.evaluate.text import completion_metrics, distinct_n, sampled_entropy, token_rows


@pytest.mark.parametrize(
    ("rows", "n", "expected"),
    [
        ([[1, 2, 3]], 1, 1.0),
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 1, 1, 1]], 2, 1 / 3),
        ([[1, 2, 1, 2]], 2, 2 / 3),  # 12, 21, 12
        ([[1, 2], [1, 2]], 2, 1 / 2),  # the same text twice
        ([[1, 2], [3, 4]], 2, 1.0),  # no gram spans two rows: 23 is none
        ([[1], [2, 3], []], 2, 1.0),  # rows too short have no grams
        ([[1], []], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_is_the_share_of_different_grams(rows: list[list[int]], n: int, expected: float):
    assert distinct_n(rows, n) == pytest.approx(expected, abs=0)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2), min_size=1), st.randoms())
def test_distinct_n_does_not_depend_on_the_order_of_rows_and_halves_when_all_is_said_twice(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert distinct_n(shuffled, 2) == distinct_n(rows, 2)
    assert distinct_n([*rows, *rows], 2) == pytest.approx(distinct_n(rows, 2) / 2)


def test_lengths_and_endings_have_trls_names():
    rollouts = make_rollouts(
        [["", ""], ["", ""]],
        ids=[[5, 0], [5, 5, 5, 5], [5, 5, 5, 5], [5, 6, 7, 0]],
        finish_reasons=["eos", "length", "length", "eos"],
    )
    assert completion_metrics(rollouts) == {
        "completions/mean_length": 3.5,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.5,
        # 10 grams; different are 50, 55, 56, 67 and 70
        "completions/distinct_2": 0.5,
        "completions/mean_terminated_length": 3.0,
    }


def test_mean_terminated_length_is_left_out_when_none_ended():
    rollouts = make_rollouts([["", ""]], ids=[[5], [5, 5]], finish_reasons=["length", "length"])
    metrics = completion_metrics(rollouts)
    assert "completions/mean_terminated_length" not in metrics
    assert metrics["completions/clipped_ratio"] == 1.0


def test_token_rows_leave_the_padding_out():
    assert token_rows(make_rollouts([["", ""]], ids=[[5, 0], [5, 6, 7, 0]])) == [[5, 0], [5, 6, 7, 0]]


def test_entropy_is_averaged_over_tokens_and_not_over_rows():
    rollouts = make_rollouts([["", ""]], ids=[[5], [5, 5, 5]], logprobs=[[-4.0], [-1.0, -2.0, -1.0]])
    assert sampled_entropy(rollouts) == 2.0
