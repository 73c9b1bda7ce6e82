"""Conversations: lists of messages with a role and a content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dar.batch import Message
from dar.errors import DataError


def read_conversation(value: Any, here: str) -> list[Message] | None:
    """The messages of a list of mappings with `role` and `content`, without their null keys; None of anything else.

    Raises:
        DataError: a role or content is no text, or a message holds what JSON cannot say.
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    if not all(isinstance(item, Mapping) and "role" in item and "content" in item for item in value):
        return None
    return [_message(item, f"{here}: message {place}") for place, item in enumerate(value)]


def text_of(value: Any, here: str) -> str:
    """A text, or the contents of messages joined.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        return value
    messages = read_conversation(value, here)
    if messages is None:
        raise DataError(f"{here} must be text or a list of messages with role and content, found {value!r:.120}")
    return "\n".join(message["content"] for message in messages)


def _message(item: Mapping[str, Any], here: str) -> Message:
    for name in ("role", "content"):
        if not isinstance(item[name], str):
            parts = " (join the texts of its parts into one string)" if isinstance(item[name], list) else ""
            raise DataError(f"{here}: '{name}' must be text{parts}, found {item[name]!r:.120}")
    # Arrow gives every message of a column the keys of all, null where there is nothing.
    message = {name: found for name, found in item.items() if found is not None}
    try:
        json.dumps(message)
    except (TypeError, ValueError) as error:
        raise DataError(f"{here} holds more than text, numbers, lists and mappings of them: {error}") from error
    return message
