"""Pairs that people have judged, from the files they are published in: HH, LLMBar, PandaLM, or plain columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dar.errors import DataError
from dar.files.tables import Row, read_table, rows_of, typed
from dar.files.transcripts import transcript_pair

Choice = Literal[0, 1, 2]
"""Which of two completions is better; 0 is a tie."""


@dataclass(frozen=True)
class LabeledPair:
    """Two completions of a prompt and what people chose.

    key: number of the row, from 0.
    prompt: a string, or messages.
    labels: one per annotator.
    """

    key: str
    prompt: str | list[dict[str, str]]
    completions: tuple[str, str]
    labels: tuple[Choice, ...]
    subset: str | None = None

    @property
    def majority(self) -> Choice | None:
        """What more than half of the annotators chose, or None."""
        return next((choice for choice in self.labels if 2 * self.labels.count(choice) > len(self.labels)), None)

    @property
    def longer(self) -> Choice:
        """The completion with more characters."""
        first, second = map(len, self.completions)
        return 0 if first == second else 1 if first > second else 2


@dataclass(frozen=True)
class LabeledPairs:
    """The pairs of a file, and the numbers of the rows left out because the two prompts differ."""

    pairs: tuple[LabeledPair, ...]
    skipped: tuple[int, ...] = ()


def read_labeled_pairs(path: Path) -> LabeledPairs:
    """Reads a preference file; the columns of the first row tell its format.

    * HH: `chosen`, `rejected`, transcripts with `\\n\\nHuman:` and `\\n\\nAssistant:` turns. The prompt is all
      before the last `\\n\\nAssistant:`, as messages; rows whose two prompts differ are skipped.
    * pairs: `prompt`, `chosen`, `rejected`.
    * LLMBar: `input`, `output_1`, `output_2`, `label` (1 or 2), `subset`.
    * PandaLM: `instruction`, `input`, `response1`, `response2`, `annotator1`, `annotator2`, … (0 is a tie).

    Where the file names the better completion by its column, a hash of the row decides which of the two comes first, so
    that a judge which always prefers the first is right about half of the time.

    Raises:
        DataError: the file cannot be read, is of no such format, or a row lacks a column or has another label.
    """
    rows = rows_of(read_table(path), where=str(path))
    reader = next((reader for needed, reader in _READERS if needed <= rows[0].keys()), None)
    if reader is None:
        raise DataError(
            f"{path} is of no preference format that is known: HH (chosen, rejected), pairs (prompt, chosen, "
            "rejected), LLMBar (input, output_1, output_2, label) or PandaLM (instruction, response1, response2, "
            f"annotator1, …); its columns are {', '.join(map(str, rows[0]))}"
        )
    found: list[LabeledPair] = []
    skipped: list[int] = []
    for number, row in enumerate(rows):
        try:
            pair = reader(row, number)
        except (KeyError, TypeError, ValueError) as error:
            what = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}: row {number}: {what}") from error
        if pair is None:
            skipped.append(number)
        else:
            found.append(pair)
    if not found:
        raise DataError(f"{path}: in none of the {len(rows)} rows have both completions the same prompt")
    return LabeledPairs(tuple(found), tuple(skipped))


def _plain(row: Row, number: int) -> LabeledPair:
    return _placed(number, _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))


def _hh(row: Row, number: int) -> LabeledPair | None:
    chosen, rejected = transcript_pair(row)
    return _placed(number, chosen.prompt, chosen.answer, rejected.answer) if chosen.prompt == rejected.prompt else None


def _placed(number: int, prompt: str | list[dict[str, str]], chosen: str, rejected: str) -> LabeledPair:
    # Both completions enter in sorted order, so that the place does not depend on which is the better one.
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    digest = hashlib.sha256("\0".join([text, *sorted([chosen, rejected])]).encode()).digest()
    is_first = digest[0] % 2 == 0
    completions = (chosen, rejected) if is_first else (rejected, chosen)
    return LabeledPair(str(number), prompt, completions, labels=(1 if is_first else 2,))


def _llmbar(row: Row, number: int) -> LabeledPair:
    completions = (_text(row, "output_1"), _text(row, "output_2"))
    labels = (_choice(row, "label", (1, 2)),)
    subset = None if row.get("subset") is None else _text(row, "subset")
    return LabeledPair(str(number), _text(row, "input"), completions, labels, subset)


def _pandalm(row: Row, number: int) -> LabeledPair:
    names = [f"annotator{index}" for index in range(1, len(row) + 1) if f"annotator{index}" in row]
    prompt = "\n\n".join(text for text in (_text(row, "instruction"), row.get("input") or "") if text)
    # The published file has responses such as True and 4.5, which were text before they were parsed.
    plain = {name: str(value) if isinstance(value, bool | int | float) else value for name, value in row.items()}
    completions = (_text(plain, "response1"), _text(plain, "response2"))
    return LabeledPair(str(number), prompt, completions, tuple(_choice(row, name, (0, 1, 2)) for name in names))


_READERS: tuple[tuple[set[str], Callable[[Row, int], LabeledPair | None]], ...] = (
    ({"prompt", "chosen", "rejected"}, _plain),
    ({"chosen", "rejected"}, _hh),
    ({"output_1", "output_2", "label"}, _llmbar),
    ({"response1", "response2", "annotator1"}, _pandalm),
)
"""What reads the rows that have these columns; the first that fits does."""


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"'{name}' must be text, found {row[name]!r}")
    return row[name]


def _choice(row: Row, name: str, allowed: Sequence[Choice]) -> Choice:
    value: Any = typed(row[name])
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"'{name}' must be one of {', '.join(map(str, allowed))}, found {row[name]!r}")
    return value
