"""Rows as others write them, turned into the columns the library reads: HH transcripts, and pairs with a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dar.config import AnyFormat, HHFormatSpec, LabelledPairsFormatSpec
from dar.errors import DataError
from dar.tables import Row
from dar.transcripts import transcript_pair

log = logging.getLogger(__name__)


def formatted(rows: Sequence[Row], spec: AnyFormat, *, where: str) -> list[Row]:
    """The rows with `prompt`, `chosen` and `rejected` (of labelled pairs only the last two), and their other columns.

    Raises:
        DataError: a row is not in this format, unusable rows are to be refused, or none is left.
    """
    kept: list[Row] = []
    num_left_out = 0
    for index, row in enumerate(rows):
        here = f"{where}: row {index}"
        match spec:
            case HHFormatSpec():
                found, key, value = _from_transcripts(row, here), "unusable", spec.unusable
            case LabelledPairsFormatSpec():
                found, key, value = _from_labels(row, spec, here), "unlabelled", spec.unlabelled
        if found is not None:
            kept.append(found)
        elif value == "refuse":
            raise DataError(f"{here}: {_problem(spec)}. Remove the row, or leave such rows out with format.{key}: skip")
        else:
            num_left_out += 1
    if not kept:
        raise DataError(f"{where}: no row is left, in all {len(rows)} {_problem(spec)}")
    if num_left_out:
        log.warning("%s: %d of %d rows were left out: %s", where, num_left_out, len(rows), _problem(spec))
    return kept


def _problem(spec: AnyFormat) -> str:
    """What an unusable row of the format is like."""
    match spec:
        case HHFormatSpec():
            return "chosen and rejected differ before the last answer, or an answer is empty"
        case LabelledPairsFormatSpec():
            return f"column '{spec.label}' has none of the labels {', '.join(spec.columns)}"


def _from_transcripts(row: Row, here: str) -> Row | None:
    try:
        chosen, rejected = transcript_pair(row)
    except ValueError as error:
        raise DataError(f"{here}: {error}") from error
    if chosen.prompt != rejected.prompt or not chosen.answer or not rejected.answer:
        return None
    answers = {"chosen": chosen.answer, "rejected": rejected.answer}
    messages = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {**row, "prompt": chosen.prompt, **messages}


def _from_labels(row: Row, spec: LabelledPairsFormatSpec, here: str) -> Row | None:
    for name in (spec.label, *spec.columns.values()):
        if name not in row:
            raise DataError(f"{here} has no column '{name}'; it has {', '.join(map(str, row)) or 'none'}")
    better = spec.columns.get(str(row[spec.label]))
    if better is None:
        return None
    (worse,) = set(spec.columns.values()) - {better}
    others = {name: value for name, value in row.items() if name not in spec.columns.values()}
    return {**others, "chosen": row[better], "rejected": row[worse]}
