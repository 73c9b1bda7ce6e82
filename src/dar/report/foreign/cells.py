"""What stands in the tables of others, as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

NOT_KNOWN = "not known"


def conversation(value: Any) -> str:
    """A prompt or a completion as one text: itself, the only message's words, or every message after its role."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return _text(value)
    words = []
    for message in value:
        said = {key: each for key, each in message.items() if key not in ("role", "content") and each}
        words.append("\n".join(_text(each) for each in (message.get("content"), said) if each))
    if len(words) == 1:
        return words[0]
    return "\n\n".join(f"{message.get('role')}: {each}" for message, each in zip(value, words, strict=True))


def plain(values: Sequence[Any]) -> list[Any]:
    """A column of one type: numbers, truth values and nothing as they are, or else all of it as text."""
    if all(value is None or type(value) in (int, float) for value in values) or {*map(type, values)} <= {bool}:
        return list(values)
    return [value if value is None else _text(value) for value in values]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
