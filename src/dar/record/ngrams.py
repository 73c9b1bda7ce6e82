"""How much sampled texts repeat themselves and each other, counted in n-grams of tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

Tokens = Sequence[int]


def distinct_n(rows: Sequence[Tokens], n: int) -> float:
    """Different n-grams / all n-grams, over all rows together: falls as texts repeat themselves or each other.

    Depends on the number of rows; compare only equal numbers.

    Args:
        rows: token ids.
        n: length of the n-grams, ≥ 1.

    Returns:
        A share in (0, 1], or 0 when no row has n tokens.

    Li et al. 2016, arXiv:1510.03055.
    """
    grams = [gram for row in rows for gram in _grams(row, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def longest_repeat_share(row: Tokens) -> float:
    """Share of a row's tokens that lie inside its longest repeated n-gram.

        n* = the largest n for which some n-gram stands at two or more places of the row (which may overlap)
        share = max over such n*-grams of |tokens covered by all its places| / T

    A text that goes round in a loop has a share near 1 whatever the loop's length; one without any repeated token 0.
    Ordinary prose repeats a word or two and stays low. This measure is the library's own.

    Args:
        row: T token ids.

    Returns:
        A share in [0, 1].
    """
    n = _longest_repeat(row)
    if n == 0:
        return 0.0
    places = defaultdict[bytes, list[int]](list)
    for start, gram in enumerate(_packed_grams(row, n)):
        places[gram].append(start)
    return max(_covered(starts, n) for starts in places.values() if len(starts) > 1) / len(row)


def group_overlap(rows: Sequence[Tokens], n: int) -> float | None:
    """Share of n-grams that two rows have in common, over all pairs: 1 when all say the same, 0 when no two share any.

        overlap = Σ_{i<j} 2 Σ_g min(c_i(g), c_j(g)) / Σ_{i<j} (N_i + N_j)

    with c_i(g) the number of times n-gram g stands in row i, and N_i = Σ_g c_i(g): Dice's coefficient of two multisets,
    the pairs weighted by their size. Both sums run over pairs, so that its level does not depend on the number of
    rows, as that of distinct-n and of self-BLEU (Zhu et al. 2018, arXiv:1802.01886) does. The library's own.

    The K counts of one n-gram in ascending order, c_(1) ≤ … ≤ c_(K), have Σ_{i<j} min = Σ_k (K − k) c_(k), for c_(k) is
    the smaller in its pairs with the K − k after it; and Σ_{i<j} (N_i + N_j) = (K − 1) Σ_i N_i.

    Args:
        rows: token ids of the K completions of one prompt.
        n: length of the n-grams, ≥ 1.

    Returns:
        A share in [0, 1]; None when there are fewer than two rows, or no row has n tokens.
    """
    counts = [Counter(_grams(row, n)) for row in rows]
    total = sum(count.total() for count in counts)
    if len(rows) < 2 or total == 0:
        return None
    by_gram = defaultdict[tuple[int, ...], list[int]](list)
    for count in counts:
        for gram, times in count.items():
            by_gram[gram].append(times)
    # Rows without the gram come first in the order and add nothing: of m that have it, the k-th has m − k after it.
    shared = sum(
        times * (len(found) - place) for found in by_gram.values() for place, times in enumerate(sorted(found), start=1)
    )
    return 2 * shared / ((len(rows) - 1) * total)


def _grams(row: Tokens, n: int) -> Iterator[tuple[int, ...]]:
    return (tuple(row[start : start + n]) for start in range(len(row) - n + 1))


def _packed_grams(row: Tokens, n: int) -> list[bytes]:
    """The same as bytes: a long one is compared at once, not token by token."""
    packed = np.asarray(row, dtype=np.int64).tobytes()
    return [packed[8 * start : 8 * (start + n)] for start in range(len(row) - n + 1)]


def _longest_repeat(row: Tokens) -> int:
    """n*, or 0: found by doubling and halving, for what holds of an n-gram holds of its beginning."""

    def repeats(n: int) -> bool:
        grams = _packed_grams(row, n)
        return len(set(grams)) < len(grams)

    known, bound = 0, 1
    while bound < len(row) and repeats(bound):
        known, bound = bound, 2 * bound
    bound = min(bound, len(row))
    while bound - known > 1:
        middle = (known + bound) // 2
        known, bound = (middle, bound) if repeats(middle) else (known, middle)
    return known


def _covered(starts: Sequence[int], n: int) -> int:
    """Places covered by n-grams that begin at `starts`, in ascending order."""
    return n + sum(min(n, after - before) for before, after in pairwise(starts))
