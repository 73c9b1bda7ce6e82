"""Instruction difficulties that AlpacaEval publishes, from a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dar.errors import DataError
from dar.files.tables import Row, read_table, rows_of

Array = NDArray[np.float64]
_DIFFICULTY = "instruction_difficulty"
_GAMED = "not_gamed_baseline"


@dataclass(frozen=True)
class GamedRows:
    """Judgements of gamed baselines: the baseline told to be longer or shorter, which shows what length alone does.

    standardized_differences: [G] length differences over their standard deviation.
    difficulties: [G].
    preferences: [G] in [0, 1].
    """

    standardized_differences: Array
    difficulties: Array
    preferences: Array


@dataclass(frozen=True)
class Difficulty:
    """Difficulties γ_x by the instructions' keys, and the gamed baselines' judgements if the file has them."""

    by_key: Mapping[str, float]
    gamed: GamedRows | None
    where: str

    def of(self, keys: Sequence[str]) -> Array:
        """[N] difficulties of the instructions.

        Raises:
            DataError: one has none.
        """
        missing = [key for key in keys if key not in self.by_key]
        if missing:
            raise DataError(
                f"{self.where} has no difficulty for {len(missing)} of {len(keys)} instructions (the first is "
                f"{missing[0]!r}). Difficulties are published for AlpacaEval's own 805 instructions, named 0 to 804; "
                "for others leave --instruction-difficulty away."
            )
        return np.array([self.by_key[key] for key in keys])


def read_difficulty(path: Path) -> Difficulty:
    """Reads AlpacaEval's `instruction_difficulty.csv`, or its `df_gamed.csv`, which also has the gamed baselines.

    The key is the column `index`, or the first one.

    Raises:
        DataError: the file cannot be read, lacks a column, or holds something that is no number.
    """
    rows = rows_of(read_table(path), where=str(path))
    if _DIFFICULTY not in rows[0]:
        raise DataError(f"{path} has no column '{_DIFFICULTY}'; it has {', '.join(map(repr, rows[0]))}")
    key = "index" if "index" in rows[0] else next(iter(rows[0]))
    by_key = dict(zip((str(row[key]) for row in rows), _column(rows, _DIFFICULTY, path).tolist(), strict=True))
    if _GAMED not in rows[0]:
        return Difficulty(by_key, None, str(path))
    gamed = GamedRows(
        standardized_differences=_column(rows, "std_delta_len", path),
        difficulties=_column(rows, _DIFFICULTY, path),
        preferences=_column(rows, "preference", path),
    )
    if not ((gamed.preferences >= -1e-9) & (gamed.preferences <= 1 + 1e-9)).all():
        raise DataError(f"{path}: preference must lie in [0, 1] in every row")
    return Difficulty(by_key, gamed, str(path))


def _column(rows: Sequence[Row], name: str, path: Path) -> Array:
    if name not in rows[0]:
        raise DataError(f"{path} has no column '{name}'; it has {', '.join(map(repr, rows[0]))}")
    try:
        values = np.array([float(row[name]) for row in rows])
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: column '{name}' must hold numbers: {error}") from error
    if not np.isfinite(values).all():
        raise DataError(f"{path}: row {int(np.argmin(np.isfinite(values)))}: '{name}' is not finite")
    return values
