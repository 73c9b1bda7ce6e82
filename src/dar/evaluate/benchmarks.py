"""IFEval and GSM8K: completions whose correctness can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dar.errors import DataError
from dar.files.tables import Row
from dar.record.intervals import Interval, wilson
from dar.verifiable.ifeval import as_list, check_instructions


@dataclass(frozen=True)
class Share:
    """A share of n in percent, with Wilson's interval."""

    percent: float
    interval: Interval
    n: int

    @classmethod
    def of(cls, values: Sequence[bool]) -> Share:
        share = sum(values) / len(values)
        return cls(100 * share, wilson(share, len(values)).scaled(100), len(values))


@dataclass(frozen=True)
class IFEval:
    """Shares of prompts with all instructions followed, and of instructions followed; strictly and loosely.

    The interval of instruction-level shares takes instructions for independent, which those of one prompt are not.
    """

    prompt_strict: Share
    instruction_strict: Share
    prompt_loose: Share
    instruction_loose: Share
    kinds: dict[str, Share]


def ifeval(rows: Sequence[Row], completions: Sequence[str]) -> IFEval:
    """IFEval's four accuracies, and strict instruction-level accuracy by kind of instruction.

    Zhou et al. 2023, arXiv:2311.07911.

    Raises:
        DataError: a row has no instructions, or one that is not known.
    """
    strict, loose = (
        [
            check_instructions(text, row["instruction_id_list"], row.get("kwargs"), loose=is_loose)
            for row, text in zip(rows, completions, strict=True)
        ]
        for is_loose in (False, True)
    )
    kinds: dict[str, list[bool]] = {}
    for row, followed in zip(rows, strict, strict=True):
        for name, value in zip(as_list(row["instruction_id_list"], "instruction_id_list"), followed, strict=True):
            kinds.setdefault(name.partition(":")[0], []).append(value)
    return IFEval(
        prompt_strict=Share.of([all(row) for row in strict]),
        instruction_strict=Share.of([value for row in strict for value in row]),
        prompt_loose=Share.of([all(row) for row in loose]),
        instruction_loose=Share.of([value for row in loose for value in row]),
        kinds={name: Share.of(values) for name, values in sorted(kinds.items())},
    )


def require_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str], where: str) -> None:
    """Raises DataError where a row lacks a column."""
    for number, row in enumerate(rows):
        missing = [name for name in names if row.get(name) is None]
        if missing:
            raise DataError(f"{where}: row {number} has no {', '.join(missing)}; it has {', '.join(map(str, row))}")
