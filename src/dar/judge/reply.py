"""A judge's answer: its text, what else it might have said at each token, and what it cost."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dar.shown import redacted

_UNSAID = re.compile(r"(?:\s|<(?!/?(?:think|reason))[^<>\s]++>)*+")
"""What tokens at the end may say beyond the text, such as `<|im_end|>`. The end of thoughts is the end of no answer."""
_END_OF_THOUGHTS = "</think>"
CUT_OFF = "cut off at its limit of tokens (a judge that thinks first needs more: raise max_tokens of its endpoint)"
"""What is said of an answer from which nothing could be read, and which had no room to end."""


class MalformedReply(Exception):
    """What came back is not a chat completion."""


@dataclass(frozen=True)
class Token:
    """A token of the answer.

    text: what it stands for.
    candidates: (text, log-probability in nats) of the likeliest tokens at its place, itself among them.
    """

    text: str
    candidates: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Reply:
    """One answer.

    text: what the judge said.
    tokens: what it sampled, with candidates, and perhaps more than the text; empty where the server gives no
        log-probabilities. `answer_tokens` are those of the text.
    prompt_tokens, completion_tokens: as the server counted them; 0 where it does not.
    is_cut: whether it ended at its limit of tokens.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cut: bool = False


def answer_start(text: str) -> int:
    """Where the answer in a judge's text begins: behind `</think>`, or at the end of thoughts that did not end."""
    start = text.rfind(_END_OF_THOUGHTS) + len(_END_OF_THOUGHTS) if _END_OF_THOUGHTS in text else 0
    return len(text) if text[start:].lstrip().startswith("<think>") else start


def answer_tokens(reply: Reply) -> tuple[Token, ...]:
    """The tokens that the text was made of, from its first character on.

    Servers that keep reasoning out of the text may leave it among the tokens, and add markers of the end. Empty where
    the last tokens are not the text: then there are no log-probabilities of it.
    """
    text = reply.text.strip()
    before, found, rest = "".join(token.text for token in reply.tokens).rpartition(text or "\0")
    index = token_at(reply.tokens, len(before))
    if not found or not _UNSAID.fullmatch(rest) or index is None:
        return ()
    first = reply.tokens[index]
    inside = len(before) - sum(len(token.text) for token in reply.tokens[:index])
    if first.text[:inside].strip():
        return ()  # it begins in what was said before
    lead = reply.text.partition(text)[0]
    return (Token(lead + first.text[inside:], first.candidates), *reply.tokens[index + 1 :])


def token_at(tokens: Sequence[Token], place: int) -> int | None:
    """Index of the token that holds character `place` of the text they join to; None where the text ends before."""
    end = 0
    for index, token in enumerate(tokens):
        end += len(token.text)
        if place < end:
            return index
    return None


# What is read of a chat completion, and nothing else: servers differ in the rest. One wrong item of a list is enough:
# an error for each of a million would fill the memory.
class _Candidate(BaseModel):
    token: str
    # A little above 0 by rounding; far above it, it is no log-probability.
    logprob: Annotated[float, Field(le=0.01)]


class _Token(_Candidate):
    bytes: Any = None
    top_logprobs: list[_Candidate] | None = Field(None, fail_fast=True)


class _Logprobs(BaseModel):
    content: list[_Token] | None = Field(None, fail_fast=True)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None
    finish_reason: Any = None


class _Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class _ChatCompletion(BaseModel):
    choices: list[_Choice] = Field(min_length=1, fail_fast=True)
    usage: _Usage | None = None


def read_reply(body: bytes) -> Reply:
    """The reply in the body of an answer of `/chat/completions`.

    Raises:
        MalformedReply: the body is not JSON, or not a chat completion with a message.
    """
    try:
        found = _ChatCompletion.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        kind = "not a chat completion"
        if "logprobs" in problem["loc"]:
            kind = "without log-probabilities that can be read (with top_logprobs: 0 none are asked for)"
        raise MalformedReply(f"{kind}: {where + ': ' if where else ''}{problem['msg']}") from error
    choice, usage = found.choices[0], found.usage or _Usage()
    content = (choice.logprobs.content if choice.logprobs else None) or []
    reply = Reply(
        text=choice.message.content or "",
        tokens=tuple(_token(token, text) for token, text in zip(content, _texts(content), strict=True)),
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        is_cut=choice.finish_reason == "length",
    )
    # A server may repeat the key, and a reply is kept and shown.
    said = "\n".join([reply.text, *(name for token in reply.tokens for name, _ in token.candidates)])
    return reply if redacted(said) == said else replace(reply, text=redacted(reply.text), tokens=())


def _texts(tokens: Sequence[_Token]) -> list[str]:
    """The tokens' texts; a character of several tokens is the last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(_spelled(token)) for token in tokens]


def _spelled(token: _Token) -> bytes:
    """UTF-8 of the token's text; its `bytes` where these are a part of a character, which no text can show."""
    given = token.bytes if isinstance(token.bytes, list) else ()
    raw = bytes(value for value in given if isinstance(value, int) and 0 <= value < 256)
    return token.token.encode() if raw == raw.decode(errors="ignore").encode() else raw


def _token(token: _Token, text: str) -> Token:
    # Different tokens may have the same text, and the sampled one need not be among the likeliest.
    candidates = dict.fromkeys((candidate.token, candidate.logprob) for candidate in token.top_logprobs or ())
    if token.token not in (name for name, _ in candidates):
        candidates[token.token, token.logprob] = None
    return Token(text, tuple(item for item in candidates if math.isfinite(item[1])))


REPLIES = TypeAdapter(Reply)
"""Writes replies as JSON, and reads them again."""
