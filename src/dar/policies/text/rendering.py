"""Texts and conversations as the tokens a model reads: one way, for the policy, for a reward model and its training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dar.batch import Message
from dar.bounded import Bounded
from dar.errors import ConfigError, DataError

_TAG = re.compile(r"</?[\w-]+>")


def control_token_ids(tokenizer: Any) -> frozenset[int]:
    """Special tokens that are none of a text: all but tags, such as `<think>`, that have no role in the tokenizer."""
    roles = {getattr(tokenizer, f"{role}_token", None) for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(index for index, text in special.items() if text in roles or not _TAG.fullmatch(text))


def opened_tag(tokenizer: Any, prompt_ids: Sequence[int], completion: str) -> str:
    """The tag a prompt ends with, if the completion closes it: a template may itself open `<think>`. Else nothing."""
    found = re.search(r"<([\w-]++)>\s*+\Z", tokenizer.decode(prompt_ids[-64:])) if "</" in completion else None
    before, closed, _ = completion.partition(f"</{found[1]}>") if found else ("", "", "")
    return found[0] if found and closed and f"<{found[1]}>" not in before else ""


def render(tokenizer: Any, prompt: str | Sequence[Message], completion: str | Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a whole conversation under the model's own chat template, or of two strings joined.

    Args:
        tokenizer: of the model that will read them.
        prompt: a string, or messages.
        completion: a string, or the messages that follow.

    Raises:
        ConfigError: the prompt is messages, and the tokenizer has no chat template.
        DataError: the template refuses the conversation, or it has no tokens.
    """
    if isinstance(prompt, str):
        text = completion if isinstance(completion, str) else "\n".join(str(each["content"]) for each in completion)
        ids = string_ids(tokenizer, prompt + text)
    else:
        last = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        ids = text_ids(tokenizer, chat_text(tokenizer, [*prompt, *last], here="the reward model"))
    if not ids:
        raise DataError("a conversation has no tokens for the reward model to read")
    return ids


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], *, here: str) -> tuple[int, ...]:
    """Token ids of what a completion follows: a string, or messages under the chat template up to where the answer
    begins. Raises as `chat_text`."""
    if isinstance(prompt, str):
        return string_ids(tokenizer, prompt, is_prompt=True)
    return text_ids(tokenizer, chat_text(tokenizer, prompt, here=here, is_prompt=True))


def string_ids(tokenizer: Any, text: str, *, is_prompt: bool = False) -> tuple[int, ...]:
    """Token ids of a string between what the tokenizer puts before one (BOS) and behind one (EOS, which no prompt
    gets). What the string has already is not there twice."""
    bare, whole = text_ids(tokenizer, "a"), tuple(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    start = next((place for place in starts if whole[place : place + len(bare)] == bare), None)
    if start is None:
        raise ConfigError("the tokenizer reads a text differently with and without its special tokens")
    front, end, ids = whole[:start], whole[start + len(bare) :], text_ids(tokenizer, text)
    ids = ids if ids[: len(front)] == front else front + ids
    return ids if is_prompt or ids[len(ids) - len(end) :] == end else ids + end


def text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of the text and of nothing else."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_text(tokenizer: Any, messages: Sequence[Message], *, here: str, is_prompt: bool = False) -> str:
    """A conversation as the model's chat template writes it.

    Args:
        tokenizer: has the template.
        messages: as the data has them.
        here: where they are, for messages.
        is_prompt: with the beginning of the answer.

    Raises:
        ConfigError: there is no chat template.
        DataError: it refuses the conversation, or what it does has no end.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{here}: prompts are messages, but the tokenizer has no chat template. Use a chat model, or give prompts "
            "as plain strings."
        )
    try:
        with Bounded():
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        if len(text) > _MOST_ADDED + 16 * sum(len(message["content"]) for message in messages):
            raise ValueError(f"it writes {len(text):,} characters")
    except Exception as error:
        of = f" of {name}" if (name := tokenizer.name_or_path) else ""
        raise DataError(f"{here}: the chat template{of} refuses this conversation: {error}") from error
    return text


_MOST_ADDED = 1 << 20
"""Characters. Templates with long instructions have some thousands."""
