"""How far a judge or a reward model chooses as people do. Shares are in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score

from dar.errors import DataError
from dar.evaluate.judgements import JudgedPair, Outcome, judgement_of, pair_up
from dar.evaluate.preference_files import Choice, LabeledPair
from dar.files.tables import Row, read_table, rows_of
from dar.record.intervals import Interval, percent

_CHOICES: dict[Outcome, Choice] = {"win": 1, "loss": 2, "tie": 0}
_OTHER: dict[Choice, Choice] = {1: 2, 2: 1, 0: 0}


@dataclass(frozen=True)
class Accuracy:
    """Choices beside the annotators' majority.

    accuracy: over the pairs for which the majority prefers one completion; a tie chosen there counts half.
    agreement: share of all pairs with the same choice, ties being a choice of their own.
    kappa: Cohen's κ over the three choices; None where chance alone agrees everywhere.
    """

    num_preferred: int
    accuracy: float | None
    wilson: Interval | None
    num_pairs: int
    agreement: float
    kappa: float | None


@dataclass(frozen=True)
class Annotators:
    """How far the annotators agree with each other: means over pairs of annotators."""

    num_annotators: int
    agreement: float
    kappa: float | None


@dataclass(frozen=True)
class Orders:
    """A judge asked in both orders, pairs with both answers only.

    first_first, second_first: with the pair's first completion shown first, and its second.
    disagreement: share of pairs whose two outcomes differ.
    """

    num_pairs: int
    first_first: Accuracy
    second_first: Accuracy
    disagreement: float


@dataclass(frozen=True)
class Agreement:
    """Agreement with people on a preference file.

    num_unlabeled: pairs without a majority, left out.
    num_unchosen: pairs the chooser gave no choice for, left out of its figures (and of no other's).
    chosen: None where nobody chose, and only baselines are reported.
    """

    num_pairs: int
    num_unlabeled: int
    num_unchosen: int
    chosen: Accuracy | None
    longer: Accuracy
    shorter: Accuracy
    subsets: dict[str, tuple[Accuracy | None, Accuracy]]
    annotators: Annotators | None
    orders: Orders | None


def agreement(
    pairs: Sequence[LabeledPair],
    choices: Mapping[str, Choice] | None = None,
    judged: Sequence[JudgedPair] | None = None,
) -> Agreement:
    """Choices beside people's, with "the longer one" and "the shorter one" beside them.

    Args:
        pairs: labeled by people.
        choices: by the pairs' keys; pairs may be missing.
        judged: the judgements the choices came from, with the pair's first completion as the model's.

    Raises:
        DataError: no pair has a majority, or choices name pairs that are none of these.
    """
    labeled = [pair for pair in pairs if pair.majority is not None]
    if not labeled:
        raise DataError(f"in none of the {len(pairs)} pairs do more than half of the annotators agree")
    _require_known(pairs, choices or {})
    longer: dict[str, Choice] = {pair.key: pair.longer for pair in labeled}
    shorter: dict[str, Choice] = {key: _OTHER[choice] for key, choice in longer.items()}
    subsets = sorted({pair.subset for pair in labeled if pair.subset is not None})

    def of_subset(name: str) -> tuple[Accuracy | None, Accuracy]:
        group = [pair for pair in labeled if pair.subset == name]
        return _chosen(group, choices), accuracy(group, longer)

    return Agreement(
        num_pairs=len(pairs),
        num_unlabeled=len(pairs) - len(labeled),
        num_unchosen=0 if choices is None else sum(pair.key not in choices for pair in labeled),
        chosen=_chosen(labeled, choices),
        longer=accuracy(labeled, longer),
        shorter=accuracy(labeled, shorter),
        subsets={name: of_subset(name) for name in subsets},
        annotators=annotators(pairs),
        orders=None if judged is None else orders(labeled, judged),
    )


def accuracy(pairs: Sequence[LabeledPair], choices: Mapping[str, Choice]) -> Accuracy:
    """Of the pairs that have a choice, of which there must be one.

    accuracy = 100 · (right + ties/2) / pairs the majority has a preference for
    """
    labels = [(pair.majority, choices[pair.key]) for pair in pairs if pair.key in choices]
    scores = [0.5 if choice == 0 else float(choice == label) for label, choice in labels if label != 0]
    share, interval = percent(scores)
    return Accuracy(
        num_preferred=len(scores),
        accuracy=share,
        wilson=interval,
        num_pairs=len(labels),
        agreement=100 * sum(label == choice for label, choice in labels) / len(labels),
        kappa=cohen_kappa([label for label, _ in labels], [choice for _, choice in labels]),
    )


def cohen_kappa(first: Sequence[int | None], second: Sequence[int | None]) -> float | None:
    """κ = (p_o − p_e) / (1 − p_e); None where p_e = 1, because both made one and the same choice throughout.

    Cohen 1960, doi:10.1177/001316446002000104.
    """
    if len({*first, *second}) == 1:
        return None
    return float(cohen_kappa_score(first, second))


def annotators(pairs: Sequence[LabeledPair]) -> Annotators | None:
    """Agreement among people, or None where there is one label a pair.

    Raises:
        DataError: pairs have different numbers of labels.
    """
    counts = {len(pair.labels) for pair in pairs}
    if len(counts) > 1:
        raise DataError(f"pairs have different numbers of annotators: {', '.join(map(str, sorted(counts)))}")
    number = counts.pop()
    if number < 2:
        return None
    columns = list(zip(*(pair.labels for pair in pairs), strict=True))
    kappas = [cohen_kappa(first, second) for first, second in combinations(columns, 2)]
    known = [kappa for kappa in kappas if kappa is not None]
    same = [np.mean(np.equal(first, second)) for first, second in combinations(columns, 2)]
    return Annotators(number, 100 * float(np.mean(same)), float(np.mean(known)) if known else None)


def orders(pairs: Sequence[LabeledPair], judged: Sequence[JudgedPair]) -> Orders | None:
    """Each order by itself, or None where no pair was answered in both."""
    both = {pair.one.pair: pair for pair in judged if pair.orders_agree is not None}
    group = [pair for pair in pairs if pair.key in both]
    if not group:
        return None

    def of_order(is_first: bool) -> Accuracy:
        outcomes: dict[str, Outcome | None] = {
            key: one.outcome for key, pair in both.items() for one in pair.judgements if one.model_first == is_first
        }
        return accuracy(group, {key: _CHOICES[outcome] for key, outcome in outcomes.items() if outcome is not None})

    differ = [not both[pair.key].orders_agree for pair in group]
    return Orders(len(group), of_order(True), of_order(False), 100 * sum(differ) / len(group))


def choices_of(judged: Sequence[JudgedPair]) -> dict[str, Choice]:
    """The choices of a judge whose "model" is each pair's first completion; failed pairs have none."""
    return {pair.one.pair: _CHOICES[pair.outcome] for pair in judged if pair.outcome is not None}


def read_choices(path: Path) -> tuple[dict[str, Choice], list[JudgedPair] | None]:
    """Choices from a file of judgements, or of scores: rows with `pair`, `score_1` and `score_2`.

    Raises:
        DataError: it is neither, or a row cannot be used.
    """
    rows = rows_of(read_table(path), where=str(path))
    if "score_1" in rows[0]:
        return dict(_scored(row, number, path) for number, row in enumerate(rows)), None
    judged = pair_up((judgement_of(row, number, str(path)) for number, row in enumerate(rows)), where=str(path))
    return choices_of(judged), judged


def _scored(row: Row, number: int, path: Path) -> tuple[str, Choice]:
    try:
        key, first, second = str(row["pair"]), float(row["score_1"]), float(row["score_2"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: row {number} needs pair, score_1 and score_2 (numbers): {error!r}") from error
    if not np.isfinite([first, second]).all():
        raise DataError(f"{path}: row {number}: a score is not finite")
    return key, 0 if first == second else 1 if first > second else 2


def _chosen(pairs: Sequence[LabeledPair], choices: Mapping[str, Choice] | None) -> Accuracy | None:
    if choices is None or not any(pair.key in choices for pair in pairs):
        return None
    return accuracy(pairs, choices)


def _require_known(pairs: Sequence[LabeledPair], choices: Mapping[str, Choice]) -> None:
    unknown = sorted(choices.keys() - {pair.key for pair in pairs})
    if unknown:
        raise DataError(
            f"choices are given for {len(unknown)} pairs that the preference file does not have, such as "
            f"{unknown[0]!r}; it has {len(pairs)} pairs, named by their row from 0. They belong to another file."
        )
