"""Repetition and overlap, on rows small enough to count by hand and against the definitions spelt out."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.record.ngrams import distinct_n, group_overlap, longest_repeat_share

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=2, max_size=5)


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


# --- repetition within a row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], 0.0),
        ([1], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 1], 2 / 3),  # the 1, twice
        ([1, 1], 1.0),  # n* = 1, both places
        ([1, 1, 1, 1], 1.0),  # n* = 3 at 0 and 1
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 1.0),  # n* = 6 at 0 and 3: all nine
        ([1, 2, 3, 4, 1, 2, 3], 6 / 7),  # n* = 3 at 0 and 4
        ([7, 1, 2, 8, 1, 2, 9, 1, 2, 0], 6 / 10),  # n* = 2, three places
        ([1, 2, 1, 2, 5, 6, 7, 6, 7], 4 / 9),  # n* = 2 twice over, 12 and 67: one gram's places count, not both
        ([1, 2, 5, 6, 1, 2, 5, 7, 5], 6 / 9),  # n* = 3; that 5 stands alone once more does not count
        ([3, 1, 2, 1, 2, 4, 1, 2], 6 / 8),  # n* = 2 (121 or 212 stands once), at 1, 3 and 6
    ],
)
def test_longest_repeat_by_hand(row: list[int], expected: float):
    assert longest_repeat_share(row) == pytest.approx(expected, abs=0)


def spelt_out(row: list[int]) -> float:
    """The definition, every n and every gram tried."""
    for n in range(len(row) - 1, 0, -1):
        shares = []
        starts = range(len(row) - n + 1)
        for gram in {tuple(row[start : start + n]) for start in starts}:
            places = [start for start in starts if tuple(row[start : start + n]) == gram]
            if len(places) > 1:
                shares.append(len({place + offset for place in places for offset in range(n)}) / len(row))
        if shares:
            return max(shares)
    return 0.0


@given(st.lists(st.integers(0, 3), max_size=30))
def test_longest_repeat_is_what_its_definition_says(row: list[int]):
    assert longest_repeat_share(row) == spelt_out(row)


def test_longest_repeat_of_tokens_that_share_bytes():
    """1 and 256 are the same bytes, one place apart: packed grams begin at whole tokens only."""
    assert longest_repeat_share([1, 256, 65536, 1 << 24]) == 0.0


# --- overlap within a group ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "n", "expected"),
    [
        ([[1, 2, 3], [1, 2, 3]], 2, 1.0),
        ([[1, 2, 3], [4, 5, 6]], 2, 0.0),
        ([[1, 2, 3], [1, 2, 4]], 2, 1 / 2),  # 2·1 / (2 + 2)
        ([[1, 1, 1], [1, 1]], 2, 2 / 3),  # 11 twice and once: 2·1 / (2 + 1)
        ([[1, 2], [1, 2], [3, 4]], 2, 1 / 3),  # of three pairs one is the same
        ([[1, 2], [1, 2], [3]], 2, 1 / 2),  # pairs (1, 1), (1, 0), (1, 0): 2 / 4, the short row shares nothing
        ([[1, 2, 3]], 2, None),  # no pair
        ([[1], [2]], 2, None),  # no bigram
        ([], 2, None),
    ],
)
def test_group_overlap_by_hand(rows: list[list[int]], n: int, expected: float | None):
    assert group_overlap(rows, n) == expected


@given(ROWS, st.integers(1, 3))
def test_group_overlap_is_the_sum_over_pairs(rows: list[list[int]], n: int):
    counts = [Counter(tuple(row[start : start + n]) for start in range(len(row) - n + 1)) for row in rows]
    shared = sum(2 * (one & other).total() for one, other in combinations(counts, 2))
    sizes = sum(one.total() + other.total() for one, other in combinations(counts, 2))
    assert group_overlap(rows, n) == (pytest.approx(shared / sizes) if sizes else None)


def test_group_overlap_of_copies():
    """Two texts that share half, m copies of each: pairs of the same text are m − 1 of 2m − 1, the others count 1/2."""
    pair = [[1, 2, 3], [1, 2, 4]]
    for copies in (1, 2, 3):
        same = (copies - 1) / (2 * copies - 1)
        assert group_overlap(pair * copies, 2) == pytest.approx(same + (1 - same) / 2)
