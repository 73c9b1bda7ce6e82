"""Judgements of pairs: what a judge said about a model's completion beside a baseline's, one line per look."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dar.errors import DataError
from dar.files.intake import is_number
from dar.files.tables import Row, typed

Outcome = Literal["win", "tie", "loss"]


@dataclass(frozen=True)
class Judgement:
    """One look of a judge at one pair, in one order.

    pair: key of the pair, the same in both orders; keys of rows that have none are their numbers from 0.
    preference: for the model's completion, in [0, 1]; 1 it is better, ½ a tie, 0 the baseline's is better, None where
        the judge gave no verdict that can be read.
    model_length, baseline_length: characters of the two completions.
    model_first: the model's completion was shown first; None where this is not known.
    category: of the prompt.
    verdict: what the judge said, as far as it was kept.
    """

    pair: str
    preference: float | None
    model_length: int
    baseline_length: int
    model_first: bool | None = None
    category: str | None = None
    verdict: str | None = None

    @property
    def outcome(self) -> Outcome | None:
        """For the model: above ½ a win, below a loss."""
        if self.preference is None:
            return None
        return "tie" if self.preference == 0.5 else "win" if self.preference > 0.5 else "loss"


@dataclass(frozen=True)
class JudgedPair:
    """The judgements of one pair: one, or one in each order."""

    judgements: tuple[Judgement, ...]

    @property
    def one(self) -> Judgement:
        """Any of them: they have the key, the category and the lengths in common."""
        return self.judgements[0]

    @property
    def preference(self) -> float | None:
        """Mean over the orders; None if any of them failed, as one order alone carries the judge's position bias."""
        values = [judgement.preference for judgement in self.judgements if judgement.preference is not None]
        return sum(values) / len(values) if len(values) == len(self.judgements) else None

    @property
    def outcome(self) -> Outcome | None:
        """A win or a loss only where all orders say so, as in Zheng et al. 2023, arXiv:2306.05685, §3.4; else a tie."""
        outcomes: set[Outcome | None] = {judgement.outcome for judgement in self.judgements}
        if None in outcomes:
            return None
        return outcomes.pop() if len(outcomes) == 1 else "tie"

    @property
    def orders_agree(self) -> bool | None:
        """Whether both orders have the same outcome; None unless both were asked and answered."""
        if len(self.judgements) < 2 or self.outcome is None:
            return None
        return self.judgements[0].outcome == self.judgements[1].outcome


def pair_up(judgements: Iterable[Judgement], *, where: str) -> list[JudgedPair]:
    """The judgements by pair, in the order of each pair's first.

    Raises:
        DataError: a pair was judged twice in one order, or its judgements are of different completions.
    """
    found: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        found.setdefault(judgement.pair, []).append(judgement)
    for key, group in found.items():
        if len({(one.model_length, one.baseline_length, one.category) for one in group}) > 1:
            raise DataError(
                f"{where}: the judgements of pair {key!r} are of different completions or categories. Keys must name "
                "one pair each: do not join judgements of several evaluations in one file."
            )
        if (len(group) > 1 and {one.model_first for one in group} != {True, False}) or len(group) > 2:
            raise DataError(
                f"{where}: pair {key!r} has {len(group)} judgements; at most two are expected, one in each order "
                "(model_first true and false)"
            )
    return [JudgedPair(tuple(group)) for group in found.values()]


def judgement_of(row: Row, number: int | str, where: str) -> Judgement:
    """A judgement from a row of a judgements file.

    Raises:
        DataError: a field is missing, unknown or of the wrong kind.
    """
    names = {field.name for field in dataclasses.fields(Judgement)}
    unknown, required = set(row) - names, ("pair", "preference", "model_length", "baseline_length")
    missing = [name for name in required if name not in row]
    if unknown or missing:
        raise DataError(
            f"{where}: row {number} is not a judgement: "
            + "; ".join(
                f"{what} {', '.join(sorted(some))}"
                for what, some in (("missing", missing), ("unknown", unknown))
                if some
            )
        )
    numbers = {name: typed(row.get(name)) for name in ("preference", "model_length", "baseline_length", "model_first")}
    value = numbers["preference"]
    numbers["preference"] = unit(value) if is_number(value) else None
    if value is not None and numbers["preference"] is None:
        raise DataError(f"{where}: row {number}: preference must be a number in [0, 1] or null, found {value!r}")
    for name in ("model_length", "baseline_length"):
        if not isinstance(numbers[name], int) or numbers[name] < 0:
            raise DataError(f"{where}: row {number}: {name} must be a count of characters, found {row[name]!r}")
    if not isinstance(numbers["model_first"], bool | None):
        raise DataError(f"{where}: row {number}: model_first must be true, false or null, found {row['model_first']!r}")
    for name in ("category", "verdict"):
        if not isinstance(row.get(name), str | None):
            raise DataError(f"{where}: row {number}: {name} must be text or null, found {row[name]!r}")
    return Judgement(**{**row, **numbers, "pair": str(row["pair"])})


def unit(value: float) -> float | None:
    """The value in [0, 1], where sums of probabilities may be off by rounding; None where it is not in there."""
    return min(1.0, max(0.0, value)) if -1e-9 <= value <= 1 + 1e-9 else None
