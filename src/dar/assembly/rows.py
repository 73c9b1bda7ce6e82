"""Rows that rewards can read, checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dar.config.rewards import AnyReward, JudgeRewardSpec, reward_name
from dar.config.verifiable import IFEvalRewardSpec, MathRewardSpec, ReasoningGymRewardSpec
from dar.errors import DataError
from dar.files.tables import Row
from dar.verifiable.ifeval import read_instructions
from dar.verifiable.maths import gold_text
from dar.verifiable.puzzles import COLUMN, check_origin


def check_rows(specs: Sequence[AnyReward], rows: Sequence[tuple[int, Row]], where: str) -> None:
    """Checks what verifiers and judges will read of rows, before anything is sampled.

    Args:
        specs: the rewards.
        rows: each with its number.
        where: of the rows, for messages.

    Raises:
        DataError: a column is missing, or what it holds in some row cannot be used.
    """
    known = {name for _, row in rows for name in row}
    for spec in specs:
        columns, check = _reads(spec)
        if missing := [column for column in columns if column not in known]:
            raise DataError(
                f"{where} has no column '{missing[0]}', which the reward '{reward_name(spec)}' reads; it has: "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        for number, row in rows if columns else ():
            # A row without a value is one that the reward does not apply to.
            if row.get(columns[0]) is not None:
                try:
                    check(*(row.get(column) for column in columns))
                except DataError as error:
                    what = f"{where}: row {number} cannot be scored by the reward '{reward_name(spec)}'"
                    raise DataError(f"{what}: {error}") from error


def _reads(spec: AnyReward) -> tuple[tuple[str, ...], Callable[..., object]]:
    """The columns that a reward reads, and what refuses their values."""
    match spec:
        case MathRewardSpec():
            return (spec.column,), gold_text
        case IFEvalRewardSpec():
            return ("instruction_id_list", "kwargs"), read_instructions
        case ReasoningGymRewardSpec():
            return (COLUMN,), check_origin
        case JudgeRewardSpec(rubric_column=str(column)):
            return (column,), bool
        case _:
            return (), bool
