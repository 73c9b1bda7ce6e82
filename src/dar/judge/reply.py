"""A judge's answer: its text, what else it might have said at each token, and what it cost."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


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
    tokens: the answer's tokens with their candidates; empty where the server gives no log-probabilities.
    prompt_tokens, completion_tokens: as the server counted them; 0 where it does not.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


# What is read of a chat completion, and nothing else: servers differ in the rest.
class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Candidate(_Part):
    token: str
    # A little above 0 by rounding; far above it, it is no log-probability.
    logprob: Annotated[float, Field(le=0.01)]


class _Token(_Candidate):
    top_logprobs: list[_Candidate] | None = None


class _Logprobs(_Part):
    content: list[_Token] | None = None


class _Message(_Part):
    content: str | None = None


class _Choice(_Part):
    message: _Message
    logprobs: _Logprobs | None = None


class _Usage(_Part):
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class _ChatCompletion(_Part):
    choices: list[_Choice] = Field(min_length=1)
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
        raise MalformedReply(f"not a chat completion: {where + ': ' if where else ''}{problem['msg']}") from error
    choice, usage = found.choices[0], found.usage or _Usage()
    content = choice.logprobs.content if choice.logprobs else None
    return Reply(
        text=choice.message.content or "",
        tokens=tuple(_token(token) for token in content or ()),
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
    )


def _token(token: _Token) -> Token:
    candidates = {candidate.token: candidate.logprob for candidate in token.top_logprobs or ()}
    # A sampled token need not be among the likeliest.
    candidates.setdefault(token.token, token.logprob)
    return Token(token.token, tuple(item for item in candidates.items() if math.isfinite(item[1])))


def to_json(reply: Reply) -> str:
    """The reply as one line of JSON."""
    return json.dumps(asdict(reply), ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Reply:
    """The reply that `to_json` wrote."""
    raw: dict[str, Any] = json.loads(text)
    tokens = tuple(
        Token(token["text"], tuple((text, logprob) for text, logprob in token["candidates"])) for token in raw["tokens"]
    )
    return Reply(raw["text"], tokens, raw["prompt_tokens"], raw["completion_tokens"])
