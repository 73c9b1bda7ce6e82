"""MT-Bench of a model, from its answers to its scores. A second call continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dar.batch import Prompt
from dar.config.data import EvalSamplingSpec
from dar.config.judge import JudgeEndpointSpec
from dar.errors import RewardError
from dar.evaluate.folder import EvaluationFolder, Lines, file_digest
from dar.evaluate.generate import Note
from dar.evaluate.models import build_generators, read_prompts
from dar.evaluate.mt_bench.grading import grade
from dar.evaluate.mt_bench.prompts import JudgePrompts
from dar.evaluate.mt_bench.questions import Question, Turns, read_questions
from dar.evaluate.mt_bench.scores import MTBench, mt_bench
from dar.judge import Client


@dataclass(frozen=True)
class Files:
    """What MT-Bench publishes: questions, reference answers, and the judge's prompts."""

    questions: Path
    references: Path
    judge_prompts: Path


def run_mt_bench(
    model: str, files: Files, judge: JudgeEndpointSpec, out: Path, sampling: EvalSamplingSpec, note: Note
) -> MTBench:
    """A model's answers to questions of two turns, each rated from 1 to 10 by a judging model.

    Args:
        model: Hub id, folder or `.gguf` file, with a chat template.
        files: see `Files`.
        judge: where it is and how it is asked.
        out: folder, continued if it is there.
        sampling: of both answers to a question.
        note: told how far it is.

    Raises:
        ConfigError: the folder holds another evaluation, the model cannot be loaded, or has no room for two answers.
        DataError: a file is not as MT-Bench's.
        RewardError: not one answer was rated.
    """
    questions = read_questions(files.questions, files.references, first=sampling.num_prompts)
    prompts = JudgePrompts.read(files.judge_prompts)
    client = Client(judge)
    folder = EvaluationFolder(
        out,
        {
            "kind": "mt-bench",
            "model": model,
            **{field.name: file_digest(getattr(files, field.name)) for field in dataclasses.fields(files)},
            "judge": judge.model_dump(exclude=set(judge.decides_nothing)),
            **sampling.model_dump(exclude={"is_plain", "num_prompts"}),
            "num_questions": sampling.num_prompts,
        },
    )
    answers = _answers(model, questions, folder.lines("model", key=("key",)), sampling, note)
    lines = folder.lines("judgements", key=("question_id", "turn"))
    result = mt_bench(grade(questions, answers, prompts, client, lines, note))
    if result.overall.both.num_ratings == 0:
        raise RewardError(
            f"none of the {result.overall.both.num_failed} answers was rated: {result.num_unanswered} requests got no "
            f"answer from the judge at {judge.base_url}, and {result.num_unreadable} of its answers hold no rating "
            f"([[1]] to [[10]]; they are in {lines.path})"
        )
    folder.write_result(dataclasses.asdict(result))
    return result


def _answers(
    model: str, questions: Sequence[Question], lines: Lines, sampling: EvalSamplingSpec, note: Note
) -> list[Turns]:
    """Both answers to every question; those that are missing are sampled, the second ones after the first."""

    def answer(row: int, turn: int) -> str:
        return lines.rows[_key(row, turn)]["completion"]

    if any(_key(row, turn) not in lines for row in range(len(questions)) for turn in (1, 2)):
        # The longest there can be, so that no second answer turns out to have no room.
        _prompts(model, questions, [("",)] * len(questions), sampling, num_completions=2)
        one = sampling.temperature
        temperatures = [question.temperature if one is None else one for question in questions]
        generators = build_generators(model, sampling, sorted(set(temperatures)))
        for turn in (1, 2):
            given = [tuple(answer(row, before) for before in range(1, turn)) for row in range(len(questions))]
            prompts = _prompts(model, questions, given, sampling, num_completions=1)
            for temperature, generator in generators.items():
                chosen = [prompt for prompt, own in zip(prompts, temperatures, strict=True) if own == temperature]
                prefix = f"turn {turn}, temperature {temperature:g}"
                generator.complete(chosen, lines, lambda text, prefix=prefix: note(f"{prefix}, {text}"))
    return [(answer(row, 1), answer(row, 2)) for row in range(len(questions))]


def _prompts(
    model: str,
    questions: Sequence[Question],
    given: Sequence[Sequence[str]],
    sampling: EvalSamplingSpec,
    *,
    num_completions: int,
) -> list[Prompt]:
    """What the model reads before its next answer, with positions of its own for each turn."""
    rows = [
        {"conversation": question.conversation(answers)} for question, answers in zip(questions, given, strict=True)
    ]
    prompts = read_prompts(
        model,
        rows,
        sampling,
        prompt_column="conversation",
        where="the questions",
        num_completions=num_completions,
    )
    return [
        dataclasses.replace(prompt, position=_position(prompt.position, len(answers) + 1))
        for prompt, answers in zip(prompts, given, strict=True)
    ]


def _position(row: int, turn: int) -> int:
    """Of an answer: its key in the file, and that of its random numbers."""
    return 2 * row + turn - 1


def _key(row: int, turn: int) -> tuple[str]:
    return (str(_position(row, turn)),)
