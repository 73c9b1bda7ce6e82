"""Reading judgements: our own JSON Lines, or annotations in AlpacaEval's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dar.errors import DataError
from dar.evaluate.judgements import JudgedPair, Judgement, judgement_of, pair_up, unit
from dar.files.intake import is_number
from dar.files.tables import Row, read_table, rows_of, typed


def read_judged_pairs(path: Path) -> list[JudgedPair]:
    """The pairs of a file of judgements or of AlpacaEval annotations; the first row's columns tell which it is.

    Raises:
        DataError: it is neither, or a row cannot be used.
    """
    rows = rows_of(read_table(path), where=str(path))
    if "output_1" in rows[0]:
        judgements = alpaca_eval_judgements(rows, where=str(path))
    elif "pair" in rows[0]:
        judgements = [judgement_of(row, number, str(path)) for number, row in enumerate(rows)]
    else:
        raise DataError(
            f"{path} holds neither judgements (pair, preference, model_length, baseline_length, …) nor AlpacaEval "
            f"annotations (preference, output_1, output_2, …); its columns are {', '.join(map(str, rows[0])) or 'none'}"
        )
    return pair_up(judgements, where=str(path))


def alpaca_eval_judgements(rows: Sequence[Row], *, where: str) -> list[Judgement]:
    """AlpacaEval's annotations as judgements: generator_2 is the model, generator_1 the baseline.

    Its preference is 1 for the baseline, 2 for the model, anything between for a judge's probability, 1.5 or 0 for a
    tie, null or NaN where the annotator failed; ours is that less 1. The key is the row's `index`, or its number, which
    is how the published instruction difficulties name instructions. The category is `dataset`. Which output was shown
    first is not in the file.

    Raises:
        DataError: a row lacks a column, or its preference is none of these; more than one model, baseline or annotator.
    """
    for name, role in (("generator_1", "baseline"), ("generator_2", "model"), ("annotator", "annotator")):
        names = sorted({str(row[name]) for row in rows if name in row})
        if len(names) > 1:
            raise DataError(
                f"{where}: more than one {role} ({name}): {', '.join(names[:5])}. Split the file by {name}."
            )
    judgements = []
    for number, row in enumerate(rows):
        missing = [name for name in ("preference", "output_1", "output_2") if name not in row]
        if missing:
            raise DataError(f"{where}: row {number} has no {', '.join(missing)}; it has {', '.join(map(str, row))}")
        for name in ("output_1", "output_2"):
            if not isinstance(row[name], str):
                raise DataError(f"{where}: row {number}: {name} must be text, found {row[name]!r}")
        judgements.append(
            Judgement(
                pair=str(row.get("index", number)),
                preference=_preference(row["preference"], f"{where}: row {number}"),
                model_length=len(row["output_2"]),
                baseline_length=len(row["output_1"]),
                category=None if row.get("dataset") is None else str(row["dataset"]),
            )
        )
    return judgements


def _preference(found: Any, where: str) -> float | None:
    value = typed(found)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    preference = (0.5 if value == 0 else unit(value - 1.0)) if is_number(value) else None
    if preference is not None:
        return preference
    raise DataError(
        f"{where}: preference is {found!r}; AlpacaEval's is 1 (baseline better) to 2 (model better), 0 for a tie, or "
        "null"
    )
