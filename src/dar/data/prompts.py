"""Prompts: rows turned into token ids in one place, and the order they are drawn in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dar.batch import Message, Prompt
from dar.config.data import DataSpec, RowsSpec
from dar.data.messages import read_conversation
from dar.data.order import ShuffledOrder
from dar.errors import ConfigError, DataError
from dar.files.tables import Row

log = logging.getLogger(__name__)

RECIPE_ADVICE = (
    "Set data.long_prompts: drop to leave them out, raise data.max_prompt_length, or lower "
    "sampling.max_completion_length."
)
"""What to do about prompts that are too long, where a recipe says what is allowed."""


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts; `position` of each is its row's index in the data as it was read.

    num_dropped: prompts left out because they were too long.
    """

    prompts: tuple[Prompt, ...]
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


def prepare_prompts(
    rows: Sequence[Row],
    read: Callable[..., tuple[int, ...]],
    spec: DataSpec,
    *,
    max_prompt_length: int | None,
    where: str,
    advice: str = RECIPE_ADVICE,
) -> PromptSet:
    """Tokenises every row's prompt, the chat template applied to messages, before anything is trained.

    Args:
        rows: mappings with the prompt column; the other columns go to the reward functions.
        read: a prompt as the policy's tokens, told where it is (`here`), as `dar.policies.text.rendering.prompt_ids`.
        spec: prompt column, wrapping, system prompt, and what happens to long prompts.
        max_prompt_length: longest prompt in tokens that leaves room for a completion, or None for no limit.
        where: of the rows, for messages.
        advice: what the user can do about prompts that are too long.

    Raises:
        DataError: a row has no usable prompt, or prompts are too long and `long_prompts` is `refuse`, or none is left.
        ConfigError: prompts are messages and the tokenizer has no chat template.
    """
    kept: list[Prompt] = []
    too_long: list[int] = []
    for index, row in enumerate(rows):
        content = prompt_content(row, spec, index, where)
        token_ids = read(content, here=f"{where}: row {index}")
        if not token_ids:
            raise DataError(f"{where}: row {index}: the prompt {content!r} has no tokens")
        if max_prompt_length is not None and len(token_ids) > max_prompt_length:
            too_long.append(index)
            continue
        columns = {name: value for name, value in row.items() if name != spec.prompt_column}
        kept.append(Prompt(position=index, content=content, token_ids=token_ids, columns=columns))
    if too_long and spec.long_prompts == "refuse":
        raise DataError(
            f"{where}: {len(too_long)} of {len(rows)} prompts are longer than {max_prompt_length} tokens (rows "
            f"{some_rows(too_long)}). {advice}"
        )
    if not kept:
        raise DataError(f"{where}: no prompt is left, all {len(rows)} are longer than {max_prompt_length} tokens")
    if too_long:
        log.warning("%s: %d of %d prompts are too long and were left out", where, len(too_long), len(rows))
    return PromptSet(tuple(kept), len(too_long))


class PromptStream(ShuffledOrder):
    """An endless, seeded order of prompts: every epoch a new permutation, nothing drawn twice in an epoch.

    A step's prompts follow from its number and from how many were drawn in place of others before it (none, but for
    `sampling.resample_tied`), so resuming means asking for the next step.

    replaced: by step (from 0), how many prompts it drew beyond the `prompts_per_step` that it has.
    """

    def __init__(self, prompts: PromptSet, *, prompts_per_step: int, seed: int) -> None:
        super().__init__(len(prompts), per_step=prompts_per_step, seed=seed)
        self.prompts = prompts.prompts
        self.replaced: dict[int, int] = {}

    def at(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of step `step` (from 0); `position` counts draws since the start of the run."""
        return self.draw(self.first(step), self.per_step)

    def first(self, step: int) -> int:
        """The position of its first prompt: how many were drawn before."""
        return step * self.per_step + sum(count for each, count in self.replaced.items() if each < step)

    def draw(self, first: int, count: int) -> tuple[Prompt, ...]:
        """The prompts at positions first…first + count − 1."""
        return tuple(
            dataclasses.replace(self.prompts[index], position=first + offset)
            for offset, index in enumerate(self.drawn(first, count))
        )

    def epoch(self, step: int) -> float:
        return self.first(step) / self.num_rows


def prompt_content(row: Row, spec: RowsSpec, index: int, where: str) -> str | list[Message]:
    """The prompt of a row: a string, or messages with the system prompt in front.

    Raises:
        DataError: the row has no usable prompt.
        ConfigError: a system prompt is set, but the prompt is plain text.
    """
    column = spec.prompt_column
    if column not in row:
        known = list(map(str, row))
        hint = f". If prompts are in another, name it: data.prompt_column: {known[0]}" if known else ""
        raise DataError(f"{where}: row {index} has no column '{column}'; it has {', '.join(known) or 'none'}{hint}")
    found = row[column]
    if isinstance(found, str) and found.strip():
        if not spec.wrap_as_user:
            if spec.system_prompt is not None:
                raise ConfigError(
                    f"data.system_prompt is set, but row {index} of {where} is a plain string, which has no room for "
                    "it: set data.wrap_as_user: true, or drop data.system_prompt"
                )
            return found
        found = [{"role": "user", "content": found}]
    messages = read_conversation(found, f"{where}: row {index}: '{column}'")
    if messages is None:
        raise DataError(
            f"{where}: row {index}: '{column}' must be a non-empty string or a list of messages with 'role' and "
            f"'content', found {found!r:.120}"
        )
    if spec.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": spec.system_prompt}, *messages]
    return messages


def some_rows(indices: list[int]) -> str:
    """The first of them, for a message."""
    return ", ".join(map(str, indices[:5])) + (", …" if len(indices) > 5 else "")
