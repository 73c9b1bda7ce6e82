"""MT-Bench's scores: means of ratings, and how sure they are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dar.evaluate.mt_bench.grading import Grade


@dataclass(frozen=True)
class MeanRating:
    """A mean of ratings.

    mean: from 1 to 10; None without a rating.
    standard_error: over questions; None with fewer than two.
    num_ratings, num_failed: answers with and without a rating. The latter are left out of the mean.
    """

    mean: float | None
    standard_error: float | None
    num_ratings: int
    num_failed: int


@dataclass(frozen=True)
class TurnScores:
    """Scores of the first answers, of the second ones, and of both together."""

    both: MeanRating
    first: MeanRating
    second: MeanRating


@dataclass(frozen=True)
class MTBench:
    """A model's scores.

    num_unreadable: answers of the judge without a rating from 1 to 10.
    num_unanswered: requests to which it gave none.
    """

    overall: TurnScores
    categories: dict[str, TurnScores]
    num_unreadable: int
    num_unanswered: int


def mt_bench(grades: Sequence[Grade]) -> MTBench:
    """The scores overall and by category, in the order in which the categories come."""
    categories: dict[str, list[Grade]] = defaultdict(list)
    for grade in grades:
        categories[grade.category].append(grade)
    failed = [grade for grade in grades if grade.rating is None]
    return MTBench(
        overall=_turns(grades),
        categories={name: _turns(members) for name, members in categories.items()},
        num_unreadable=sum(grade.was_answered for grade in failed),
        num_unanswered=sum(not grade.was_answered for grade in failed),
    )


def mean_rating(grades: Sequence[Grade]) -> MeanRating:
    """Mean of the ratings r_qt of questions q, and its standard error with questions as clusters.

        m = Σ r_qt / N,    se = √( n/(n−1) · Σ_q (Σ_t (r_qt − m))² ) / N

    The two answers to a question are not independent: the second one builds on the first. Where every question has as
    many ratings, se is s/√n of the questions' means.

    Args:
        grades: those without a rating are counted and left out.

    Returns:
        With N ratings of n questions.
    """
    ratings: dict[str, list[float]] = defaultdict(list)
    for grade in grades:
        if grade.rating is not None:
            ratings[grade.question_id].append(grade.rating)
    n, total = len(ratings), sum(map(len, ratings.values()))
    if n == 0:
        return MeanRating(None, None, 0, len(grades))
    mean = math.fsum(rating for values in ratings.values() for rating in values) / total
    error = None
    if n > 1:
        squares = math.fsum(math.fsum(rating - mean for rating in values) ** 2 for values in ratings.values())
        error = math.sqrt(n / (n - 1) * squares) / total
    return MeanRating(mean, error, total, len(grades) - total)


def _turns(grades: Sequence[Grade]) -> TurnScores:
    first, second = ([grade for grade in grades if grade.turn == turn] for turn in (1, 2))
    return TurnScores(mean_rating(grades), mean_rating(first), mean_rating(second))
