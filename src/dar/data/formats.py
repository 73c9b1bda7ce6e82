"""Rows as others write them, turned into the columns the library reads: HH transcripts, and pairs with a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dar.config.data import AnyFormat, HHFormatSpec, LabelledPairsFormatSpec
from dar.errors import DataError
from dar.files.tables import Row
from dar.files.transcripts import transcript_pair

log = logging.getLogger(__name__)


def formatted(rows: Sequence[Row], spec: AnyFormat, *, where: str) -> list[Row]:
    """The rows with `prompt`, `chosen` and `rejected` (of labelled pairs only the last two), and their other columns.

    Raises:
        DataError: a row is not in this format, unusable rows are to be refused, or none is left.
    """
    kept: list[Row] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        here = f"{where}: row {index}"
        match spec:
            case HHFormatSpec():
                found, key, value = _from_transcripts(row, here), "unusable", spec.unusable
            case LabelledPairsFormatSpec():
                found, key, value = _from_labels(row, spec, here), "unlabelled", spec.unlabelled
        if not isinstance(found, str):
            kept.append(found)
        elif value == "refuse":
            raise DataError(f"{here}: {found}. Remove the row, or leave such rows out with format.{key}: skip")
        else:
            problems.append(found)
    if not kept:
        raise DataError(f"{where}: no row is left, in all {len(rows)} {problems[0]}")
    if problems:
        log.warning("%s: %d of %d rows were left out: %s", where, len(problems), len(rows), problems[0])
    return kept


def _label(value: Any) -> str:
    """A label as text, the same for 1 and 1.0, and for true in JSON, YAML and CSV."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if str(value).lower() in ("true", "false") else str(value)


def _from_transcripts(row: Row, here: str) -> Row | str:
    """The row, or what makes it unusable."""
    try:
        chosen, rejected = transcript_pair(row)
    except ValueError as error:
        raise DataError(f"{here}: {error}") from error
    if chosen.prompt != rejected.prompt or not chosen.answer or not rejected.answer:
        return "chosen and rejected differ before the last answer, or an answer is empty"
    answers = {"chosen": chosen.answer, "rejected": rejected.answer}
    messages = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {**row, "prompt": chosen.prompt, **messages}


def _from_labels(row: Row, spec: LabelledPairsFormatSpec, here: str) -> Row | str:
    """The row, or what makes it unusable."""
    for name in (spec.label, *spec.columns.values()):
        if name not in row:
            raise DataError(f"{here} has no column '{name}'; it has {', '.join(map(str, row)) or 'none'}")
    better = {_label(name): column for name, column in spec.columns.items()}.get(_label(row[spec.label]))
    if better is None:
        labels = ", ".join(spec.columns)
        return f"column '{spec.label}' has none of the labels {labels} (but such as {row[spec.label]!r:.120})"
    (worse,) = set(spec.columns.values()) - {better}
    others = {name: value for name, value in row.items() if name not in spec.columns.values()}
    return {**others, "chosen": row[better], "rejected": row[worse]}
