"""Preference pairs as text: what a reward model learns from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dar.batch import Message
from dar.config.data import RowsSpec
from dar.config.reward_model import PairDataSpec
from dar.data.logged import answer, readable
from dar.data.prompts import prompt_content, some_rows
from dar.errors import DataError
from dar.files.intake import is_number
from dar.files.tables import Row, typed
from dar.policies.text.rendering import render

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two completions of it, the better one first.

    prompt: a string or messages. chosen, rejected: one message of the assistant's each. margin: how much better, in
    reward units (0 where nobody said).
    """

    prompt: str | list[Message]
    chosen: Message
    rejected: Message
    margin: float = 0.0


def read_pairs(
    rows: Sequence[Row], spec: RowsSpec, *, margin_column: str | None = None, where: str
) -> list[PreferencePair]:
    """The pairs of `prompt`, `chosen` and `rejected` rows, read as the offline methods read them.

    Raises:
        DataError: a row lacks a column or holds something else than it should, or a margin is no finite number.
        ConfigError: a system prompt is set, but prompts are plain text.
    """
    pairs: list[PreferencePair] = []
    for index, row in enumerate(readable(rows, spec.prompt_column, "preferences", where)):
        here = f"{where}: row {index}"
        prompt = prompt_content(row, spec, index, where)
        chosen, rejected = (answer(row[name], prompt, here) for name in ("chosen", "rejected"))
        for message in (chosen, rejected):
            if not message["content"].strip():
                raise DataError(f"{here} has an empty completion")
        margin = 0.0 if margin_column is None else _margin(row, margin_column, here)
        pairs.append(PreferencePair(prompt, chosen, rejected, margin))
    return pairs


@dataclass(frozen=True)
class TokenPair:
    """A pair as a reward model reads it: whole conversations, the better one first."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float

    @property
    def longer_by(self) -> int:
        """Tokens of the chosen completion less those of the rejected one: they share their prompt."""
        return len(self.chosen) - len(self.rejected)


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: Any, spec: PairDataSpec, *, max_length: int | None, where: str
) -> list[TokenPair]:
    """Pairs under the reward model's tokenizer and chat template.

    Args:
        pairs: as text.
        tokenizer: of the reward model.
        spec: says what happens to long pairs.
        max_length: longest conversation in tokens, or None.
        where: of the pairs, for messages.

    Raises:
        DataError: pairs are too long and `long_pairs` is `refuse`, or none is left.
        ConfigError: prompts are messages, and the tokenizer has no chat template.
    """
    kept: list[TokenPair] = []
    too_long: list[int] = []
    for index, pair in enumerate(pairs):
        chosen, rejected = (
            render(tokenizer, pair.prompt, message["content"] if isinstance(pair.prompt, str) else [message])
            for message in (pair.chosen, pair.rejected)
        )
        if max_length is not None and max(len(chosen), len(rejected)) > max_length:
            too_long.append(index)
        else:
            kept.append(TokenPair(chosen, rejected, pair.margin))
    if too_long and spec.long_pairs == "refuse":
        raise DataError(
            f"{where}: {len(too_long)} of {len(pairs)} pairs have a conversation of more than {max_length} tokens "
            f"(rows {some_rows(too_long)}). Set data.long_pairs: drop to leave them out, or raise data.max_length."
        )
    if not kept:
        raise DataError(f"{where}: no pair is left, all {len(pairs)} are longer than {max_length} tokens")
    if too_long:
        log.warning("%s: %d of %d pairs are too long and were left out", where, len(too_long), len(pairs))
    return kept


def _margin(row: Row, column: str, here: str) -> float:
    found = row.get(column)
    margin = typed(found)
    if not is_number(margin):
        raise DataError(f"{here}: the margin in column '{column}' must be a finite number, found {found!r:.120}")
    return float(margin)
