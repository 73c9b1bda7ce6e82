"""What the judge is told: MT-Bench's prompts for a single answer, filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from dar.errors import DataError
from dar.evaluate.mt_bench.questions import Question, Turns
from dar.files.tables import read_table, rows_of
from dar.judge.template import Messages

_FIELDS = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2"},
    "single-math-v1-multi-turn": {
        "question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2",
    },
}  # fmt: skip
"""What each prompt is filled with."""


def prompt_name(question: Question, turn: int) -> str:
    """Which prompt an answer is rated with; `turn` is 1 or 2."""
    return f"single{'' if question.references is None else '-math'}-v1{'-multi-turn' if turn == 2 else ''}"


@dataclass(frozen=True)
class JudgePrompts:
    """(system, user) templates by name."""

    templates: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> JudgePrompts:
        """Those of a file with `name`, `system_prompt`, `prompt_template` and `output_format`; others are passed over.

        Raises:
            DataError: one is missing, or is not as MT-Bench's.
        """
        rows = {row.get("name"): row for row in rows_of(read_table(path), where=str(path))}
        found: dict[str, tuple[str, str]] = {}
        for name, fields in _FIELDS.items():
            if name not in rows:
                raise DataError(f"{path} has no judge prompt named {name}")
            row = rows[name]
            system, user = row.get("system_prompt"), row.get("prompt_template")
            if not isinstance(system, str) or not isinstance(user, str):
                raise DataError(f"{path}: {name}: system_prompt and prompt_template must be texts")
            if row.get("output_format") != "[[rating]]":
                raise DataError(f"{path}: {name}: the output_format must be [[rating]]")
            if _fields(user) != fields:
                raise DataError(
                    f"{path}: {name}: the prompt_template must have the fields {', '.join(sorted(fields))} and no "
                    f"other; it has {', '.join(sorted(map(str, _fields(user) or ['none that can be read'])))}"
                )
            found[name] = (system, user)
        return cls(found)

    def messages(self, question: Question, answers: Turns, turn: int) -> Messages:
        """What the judge is asked about an answer; `turn` is 1 or 2."""
        values = dict(zip(("question_1", "question_2", "answer_1", "answer_2"), question.turns + answers, strict=True))
        values |= {"question": question.turns[0], "answer": answers[0]}
        if question.references is not None:
            values |= {"ref_answer_1": question.references[0], "ref_answer_2": question.references[1]}
        system, user = self.templates[prompt_name(question, turn)]
        return Messages(system, user.format_map(values))


def _fields(template: str) -> set[str] | None:
    """The names in braces; None where something else is. A template reaches into no attribute of what fills it."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError:
        return None
    return None if any(form or conversion for _, form, conversion in parts) else {str(name) for name, *_ in parts}
