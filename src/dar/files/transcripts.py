"""Conversations written as one text, as in Anthropic's HH data: `\\n\\nHuman: …` and `\\n\\nAssistant: …` turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Transcript:
    """A conversation up to its last answer, and that answer."""

    prompt: list[dict[str, str]]
    answer: str


def parse_transcript(text: str) -> Transcript | None:
    """The conversation of an HH transcript, or None where the text is none.

    Whitespace around a turn is no part of it; turns of one speaker in a row are one message.
    """
    before, marker, answer = text.rpartition(_ANSWER)
    start, *pieces = _TURN.split(before)
    if not marker or start.strip() or not pieces or pieces[0] != "Human":
        return None
    messages: list[dict[str, str]] = []
    for speaker, words in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLES[speaker], words.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n\n{content}"}
        else:
            messages.append({"role": role, "content": content})
    return Transcript(messages, answer.strip())


def transcript_pair(row: Mapping[str, Any]) -> tuple[Transcript, Transcript]:
    """The transcripts in `chosen` and `rejected`, whose prompts may differ.

    Raises:
        ValueError: one is no transcript.
    """
    return _transcript(row, "chosen"), _transcript(row, "rejected")


def _transcript(row: Mapping[str, Any], name: str) -> Transcript:
    text = row.get(name)
    found = parse_transcript(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"'{name}' is no transcript of the hh format, a string of '\\n\\nHuman: …' and '\\n\\nAssistant: …' turns "
            f"that begins with the first and has an answer (text without turns needs a column 'prompt' beside it): "
            f"{str(text)[:120]!r}"
        )
    return found
