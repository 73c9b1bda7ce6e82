"""Class labels as prompts: what a tokenizer is to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dar.batch import Message
from dar.errors import DataError


@dataclass(frozen=True)
class Labels:
    """Reads the label of a prompt; as tokens, the steps of a completion are their numbers.

    num_classes: of the model.
    """

    num_classes: int
    chat_template: None = None

    def read(self, content: str | Sequence[Message], *, here: str) -> tuple[int]:
        """The label in a prompt's text, its one token. Raises DataError where it is none of the model's."""
        text = content.strip() if isinstance(content, str) else ""
        if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) < self.num_classes):
            raise DataError(
                f"{here}: the prompt {content!r:.80} is no class of the model: expected a number, as text, from "
                f'"0" to "{self.num_classes - 1}"'
            )
        return (int(text),)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)
