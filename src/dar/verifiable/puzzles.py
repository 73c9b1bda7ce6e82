"""Tasks of reasoning-gym: questions made by name, size and seed, and how good an answer to one is."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from dar.errors import DataError, require_package
from dar.files.hints import nearest_hint
from dar.verifiable.maths import last_tagged

PREFIX = "reasoning_gym:"
COLUMN = "reasoning_gym"
"""Column that says which question a row is."""

_DEFAULTS = {"size": 1000, "seed": 0}


def puzzle_rows(path: str) -> list[dict[str, Any]]:
    """The rows of `reasoning_gym:TASK?size=1000&seed=0`: `prompt`, `answer`, and where they come from.

    Raises:
        DataError: the task is not known, or the path is not of this form.
        ConfigError: reasoning-gym is not installed.
    """
    task, _, query = path.removeprefix(PREFIX).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := given.keys() - _DEFAULTS.keys():
        raise DataError(f"{path}: unknown {', '.join(sorted(unknown))}; expected {PREFIX}TASK?size=1000&seed=0")
    if not all(re.fullmatch("[0-9]{1,18}", value) for value in given.values()):
        raise DataError(f"{path}: size and seed are whole numbers")
    settings = _DEFAULTS | {name: int(value) for name, value in given.items()}
    if not 1 <= settings["size"] <= 1_000_000:
        raise DataError(f"{path}: size is 1 to 1,000,000")
    questions = _questions(task, settings["size"], settings["seed"])
    return [
        {
            "prompt": questions[index]["question"],
            "answer": questions[index]["answer"],
            COLUMN: {"task": task, **settings, "index": index},
        }
        for index in range(settings["size"])
    ]


def score_answer(text: str, origin: Mapping[str, Any]) -> float:
    """The task's own score of a completion, in [0, 1]: some give part of it for an answer that is nearly right.

    The answer is what stands in the last `<answer>…</answer>`, or the whole text.

    Args:
        text: the completion.
        origin: the row's column `reasoning_gym`.
    """
    questions = _questions(origin["task"], origin["size"], origin["seed"])
    return float(questions.score_answer(last_tagged(text).strip(), questions[origin["index"]]))


def check_origin(origin: Any) -> None:
    """Raises DataError where a row's column `reasoning_gym` does not say which question the row is."""
    if not isinstance(origin, Mapping) or not origin.keys() >= {"task", "index", *_DEFAULTS}:
        raise DataError(
            f"{COLUMN} must have task, size, seed and index, as {PREFIX}TASK makes it; found {origin!r:.200}"
        )


@functools.lru_cache(maxsize=8)
def _questions(task: str, size: int, seed: int) -> Any:
    gym, known = load_reasoning_gym()
    if task not in known:
        raise DataError(f"reasoning-gym has no task '{task}'{nearest_hint(task, known)}")
    return gym.create_dataset(task, size=size, seed=seed)


@functools.cache
def load_reasoning_gym() -> tuple[Any, list[str]]:
    """The package and the names of its tasks.

    Raises:
        ConfigError: it is not installed.
    """
    require_package("reasoning_gym", "a task of reasoning-gym")
    import reasoning_gym  # noqa: PLC0415 - an extra, and slow
    from reasoning_gym.factory import DATASETS  # noqa: PLC0415

    return reasoning_gym, sorted(DATASETS)
