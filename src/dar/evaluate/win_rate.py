"""Win rates of judged pairs, and what position and length had to do with them. Rates are in percent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dar.errors import DataError
from dar.evaluate.judgements import JudgedPair
from dar.record.intervals import Interval, bootstrap, percent, standard_error, wilson

NUM_LENGTH_BINS = 5


@dataclass(frozen=True)
class Tally:
    """Outcomes of some pairs.

    win_rate: mean preference for the model, %.
    discrete_win_rate: 100 · (wins + ties/2) / pairs.
    wilson: of the discrete win rate, %; with half ties it is a little too wide.
    """

    num_pairs: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    discrete_win_rate: float
    wilson: Interval


@dataclass(frozen=True)
class PositionBias:
    """How much the order of the two completions decided.

    first_shown_win_rate: mean preference for whichever was shown first, %; 50 without bias (if both orders were asked).
    disagreement: share of the pairs judged in both orders whose two outcomes differ, %; None without such pairs.
    """

    num_judgements: int
    first_shown_win_rate: float
    num_both_orders: int
    disagreement: float | None


@dataclass(frozen=True)
class LengthBin:
    """Pairs whose length difference, model less baseline in characters, lies in [low, high]."""

    low: int
    high: int
    num_pairs: int
    win_rate: float


@dataclass(frozen=True)
class LengthBias:
    """How much length went along with winning.

    model_length, baseline_length: mean, characters.
    longer_wins: share of the decided pairs of different lengths in which the longer completion won, %, or None.
    bins: pairs by quantiles of the length difference.
    """

    model_length: float
    baseline_length: float
    num_decided: int
    longer_wins: float | None
    longer_wins_wilson: Interval | None
    bins: tuple[LengthBin, ...]


@dataclass(frozen=True)
class WinRate:
    """The win rate of a model against a baseline.

    standard_error: of the mean preference over pairs, %; None for a single pair.
    bootstrap: of the mean preference, pairs resampled, %.
    num_failed: pairs left out, because a judgement of theirs failed.
    position: None where nobody noted which completion was shown first.
    """

    overall: Tally
    standard_error: float | None
    bootstrap: Interval
    num_failed: int
    categories: dict[str, Tally]
    position: PositionBias | None
    length: LengthBias


def win_rate(pairs: Sequence[JudgedPair], *, resamples: int, seed: int) -> WinRate:
    """Everything about judged pairs.

        win rate = 100 · mean p,  standard error = 100 · s/√n (s with n − 1)

    p is the mean preference over a pair's orders: for a judge that answers with probabilities these are AlpacaEval 2's
    figures, and for one that answers win, tie or loss the win rate counts ties as half.

    Args:
        pairs: of one model and one baseline.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: no pair was judged.
    """
    judged = [pair for pair in pairs if pair.preference is not None]
    if not judged:
        raise DataError(f"none of the {len(pairs)} pairs has a judgement that could be read")
    preferences = preferences_of(judged)
    interval, _ = bootstrap(lambda drawn: float(preferences[drawn].mean()), len(judged), resamples=resamples, seed=seed)
    names = sorted({pair.one.category for pair in judged if pair.one.category is not None})
    return WinRate(
        overall=tally(judged),
        standard_error=100 * standard_error(preferences.tolist()) if len(judged) > 1 else None,
        bootstrap=interval.scaled(100),
        num_failed=len(pairs) - len(judged),
        categories={name: tally([pair for pair in judged if pair.one.category == name]) for name in names},
        position=position_bias(pairs),
        length=length_bias(judged),
    )


def preferences_of(pairs: Sequence[JudgedPair]) -> np.ndarray:
    """[N] the pairs' preferences, which must not have failed."""
    return np.array([pair.preference for pair in pairs], dtype=np.float64)


def tally(pairs: Sequence[JudgedPair]) -> Tally:
    """Outcomes of at least one pair that was judged."""
    outcomes = Counter(pair.outcome for pair in pairs)
    discrete = (outcomes["win"] + outcomes["tie"] / 2) / len(pairs)
    return Tally(
        num_pairs=len(pairs),
        wins=outcomes["win"],
        ties=outcomes["tie"],
        losses=outcomes["loss"],
        win_rate=100 * float(preferences_of(pairs).mean()),
        discrete_win_rate=100 * discrete,
        wilson=wilson(discrete, len(pairs)).scaled(100),
    )


def position_bias(pairs: Sequence[JudgedPair]) -> PositionBias | None:
    """Of the judgements that note the order and did not fail."""
    first = [
        one.preference if one.model_first else 1 - one.preference
        for pair in pairs
        for one in pair.judgements
        if one.preference is not None and one.model_first is not None
    ]
    if not first:
        return None
    agree = [pair.orders_agree for pair in pairs if pair.orders_agree is not None]
    return PositionBias(
        num_judgements=len(first),
        first_shown_win_rate=100 * sum(first) / len(first),
        num_both_orders=len(agree),
        disagreement=100 * agree.count(False) / len(agree) if agree else None,
    )


def length_bias(pairs: Sequence[JudgedPair]) -> LengthBias:
    """Of pairs that were judged. Association only: longer completions may have won because they were better."""
    differences = np.array([pair.one.model_length - pair.one.baseline_length for pair in pairs])
    preferences = preferences_of(pairs)
    longer = [
        (pair.outcome == "win") == (difference > 0)
        for pair, difference in zip(pairs, differences, strict=True)
        if pair.outcome != "tie" and difference != 0
    ]
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, NUM_LENGTH_BINS + 1)))
    place = np.searchsorted(edges[1:-1], differences, side="left")
    bins = [
        LengthBin(
            low=int(differences[place == number].min()),
            high=int(differences[place == number].max()),
            num_pairs=int((place == number).sum()),
            win_rate=100 * float(preferences[place == number].mean()),
        )
        for number in np.unique(place)
    ]
    share, interval = percent(longer)
    return LengthBias(
        model_length=float(np.mean([pair.one.model_length for pair in pairs])),
        baseline_length=float(np.mean([pair.one.baseline_length for pair in pairs])),
        num_decided=len(longer),
        longer_wins=share,
        longer_wins_wilson=interval,
        bins=tuple(bins),
    )
