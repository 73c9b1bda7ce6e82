"""A prompt with its completion as the tokens another model reads: one way, for training a reward model and for use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dar.batch import Message
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
        ids = tokenizer(prompt + text)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise ConfigError(
                "prompts are messages, but the reward model's tokenizer has no chat template: use a reward model that "
                "reads conversations, or give prompts as plain strings"
            )
        last = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        try:
            ids = tokenizer.apply_chat_template([*prompt, *last], return_dict=True)["input_ids"]
        except Exception as error:
            raise DataError(f"the reward model's chat template refuses a conversation: {error}") from error
    if not ids:
        raise DataError("a conversation has no tokens for the reward model to read")
    return tuple(ids)
