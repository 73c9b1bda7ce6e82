"""MT-Bench's questions, with reference answers where the judge is shown one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar.batch import Message
from dar.errors import DataError
from dar.files.tables import Row, read_table, rows_of

REFERENCED = frozenset({"math", "reasoning", "coding"})
"""Categories whose answers are rated beside a reference answer."""
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
"""What answers are sampled at; 0 = the likeliest token every time."""
OTHER_TEMPERATURE = 0.7
"""Of categories that MT-Bench does not have."""

Turns = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A question and the one that follows.

    references: answers to both, in categories that are rated beside them; else None.
    """

    question_id: str
    category: str
    turns: Turns
    references: Turns | None

    @property
    def temperature(self) -> float:
        """Published for its category."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)

    def conversation(self, answers: Sequence[str]) -> list[Message]:
        """What the model is given for its next answer, after those it gave."""
        messages: list[Message] = []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


def read_questions(questions: Path, references: Path, *, first: int | None = None) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        questions: rows with `question_id`, `category` and `turns`.
        references: rows with `question_id` and `choices`, the first of which has `turns`.
        first: only so many; None = all.

    Raises:
        DataError: a row is not as described, an id occurs twice, or a reference answer is missing.
    """
    rows = rows_of(read_table(questions), where=str(questions))[:first]
    answers = _references(references)
    found: dict[str, Question] = {}
    for number, row in enumerate(rows):
        where = f"{questions}: row {number}"
        question_id, category = _id(row, where), row.get("category")
        if not isinstance(category, str):
            raise DataError(f"{where} has no category")
        if question_id in found:
            raise DataError(f"{where}: question {question_id} is there twice")
        if category in REFERENCED and question_id not in answers:
            raise DataError(
                f"{references} has no answer to question {question_id}, and those of category {category} are rated "
                "beside one"
            )
        turns = _two(row.get("turns"), f"{where}: turns")
        reference = answers[question_id] if category in REFERENCED else None
        found[question_id] = Question(question_id, category, turns, reference)
    return list(found.values())


def _references(path: Path) -> dict[str, Turns]:
    found: dict[str, Turns] = {}
    for number, row in enumerate(rows_of(read_table(path), where=str(path))):
        where = f"{path}: row {number}"
        choices: Any = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        found[_id(row, where)] = _two(turns, f"{where}: choices[0].turns")
    return found


def _id(row: Row, where: str) -> str:
    if row.get("question_id") is None:
        raise DataError(f"{where} has no question_id; it has {', '.join(map(str, row))}")
    return str(row["question_id"])


def _two(value: Any, where: str) -> Turns:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: expected a list of two texts, found {str(value)[:120]!r}")
    return value[0], value[1]
