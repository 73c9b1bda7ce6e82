"""Ratings of answers by a judging model, appended to a file as they come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dar.evaluate.folder import Lines
from dar.evaluate.generate import Note
from dar.evaluate.mt_bench.prompts import JudgePrompts, prompt_name
from dar.evaluate.mt_bench.questions import Question, Turns
from dar.judge import Client
from dar.judge.client import Session
from dar.judge.judge import ask_all
from dar.judge.reply import CUT_OFF, answer_start
from dar.rewards import Failed

# Possessive, so that a million digits are not tried over and over.
_RATING = re.compile(r"\[\[(\d++(?:\.\d*+)?)\]\]")
_BARE_RATING = re.compile(r"\[(\d++(?:\.\d*+)?)\]")
LOW, HIGH = 1, 10


@dataclass(frozen=True)
class Grade:
    """What the judge says of an answer.

    turn: 1 or 2.
    rating: from 1 to 10; None where there is none.
    was_answered: whether the judge said anything at all.
    """

    question_id: str
    category: str
    turn: int
    rating: float | None
    was_answered: bool = True


def read_rating(text: str) -> float | None:
    """The first number in double brackets, or else in single ones; None if there is none, or it is not in 1…10.

    What stands before `</think>` is not the answer.
    """
    start = answer_start(text)
    found = _RATING.search(text, start) or _BARE_RATING.search(text, start)
    rating = None if found is None else float(found[1])
    return rating if rating is not None and LOW <= rating <= HIGH else None


def grade(
    questions: Sequence[Question],
    answers: Sequence[Turns],
    prompts: JudgePrompts,
    client: Client,
    lines: Lines,
    note: Note,
) -> list[Grade]:
    """Has both answers to every question rated, where the file does not have it yet.

    A judge's answer without a rating is kept and not asked for again: the judge would say the same. A request that
    failed leaves no row, and is made again by the next call.

    Args:
        lines: keyed by `question_id` and `turn`.

    Raises:
        RewardError: the endpoint would refuse every request.
    """
    items = [(question, given, turn) for question, given in zip(questions, answers, strict=True) for turn in (1, 2)]
    missing = [item for item in items if (item[0].question_id, item[2]) not in lines]
    failures: list[str] = []

    async def ask(session: Session, question: Question, given: Turns, turn: int) -> None:
        reply = await session.ask(prompts.messages(question, given, turn))
        if isinstance(reply, Failed):
            failures.append(reply.reason)
            return
        row = {"question_id": question.question_id, "turn": turn, "category": question.category}
        row |= {"judge_prompt": prompt_name(question, turn), "rating": read_rating(reply.text), "judgement": reply.text}
        if reply.is_cut and row["rating"] is None:
            note(f"question {question.question_id}, turn {turn}: the judge's answer has no rating, and was {CUT_OFF}")
        lines.append([row])
        note(f"{lines.path.stem}: {len(lines.rows)} of {len(items)}")

    async def everything() -> None:
        async with client.session() as session:
            await ask_all([ask(session, *item) for item in missing])

    if missing:
        asyncio.run(everything())
    if failures:
        note(f"{len(failures)} answers were not rated, the same command asks again; the first: {failures[0]}")
    return [_grade(question, turn, lines) for question, _, turn in items]


def _grade(question: Question, turn: int, lines: Lines) -> Grade:
    row = lines.rows.get((question.question_id, turn))
    rating = None if row is None else row["rating"]
    return Grade(question.question_id, question.category, turn, rating, was_answered=row is not None)
