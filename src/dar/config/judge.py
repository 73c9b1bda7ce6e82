"""Specs of a judge: where it is, how it is asked, and what it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from dar.config.base import Count, NotNegative, Positive, Spec

_FIXED = ("model", "messages", "stream", "n")


class JudgeEndpointSpec(Spec):
    """An OpenAI-compatible server (`POST base_url/chat/completions`) and how it is asked."""

    decides_nothing: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "api_key_env", "concurrency", "timeout", "patience"}
    )
    """Fields that may change without another verdict: where the judge is, and how patiently it is asked."""

    base_url: str
    """Such as `http://127.0.0.1:8000/v1`. Prompts and completions are sent there."""
    model: str
    """As the server calls it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, never the key itself; none is sent by default."""
    temperature: NotNegative = 0.0
    """Of the judge's own sampling; 0 = its likeliest answer."""
    max_tokens: Count = 16
    """Most tokens of an answer; a judge that thinks first needs more."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 20
    """Candidates per token to ask for, to take the expectation of scores; 0 for servers that refuse to be asked."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """What else goes into each request, as it is; `max_tokens: null` takes a key out that the server does not know."""
    concurrency: Count = 32
    """Requests under way at once."""
    timeout: Positive = 60.0
    """Seconds one attempt may take as a whole."""
    patience: NotNegative = 300.0
    """Seconds of failed attempts (429, 5xx, timeouts, lost connections) before a request is given up."""

    @field_validator("base_url")
    @classmethod
    def _is_a_url_without_secrets(cls, value: str) -> str:
        parts = urlsplit(value)
        is_plain = value.isprintable() and " " not in value and parts.port != 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise ValueError("expected a URL such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "a URL with a user, a password or a query may hold a secret, and the recipe is copied into the run "
                "folder: put the key into an environment variable and its name into api_key_env"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # The value is not repeated: it may be the key.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(
                "expected the name of an environment variable, such as OPENAI_API_KEY, and not the key itself"
            )
        return value

    @field_validator("parameters")
    @classmethod
    def _leaves_the_question_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        fixed = [name for name in _FIXED if name in value]
        if fixed:
            raise ValueError(f"{', '.join(fixed)} cannot be set here")
        return value


class JudgeBudgetSpec(Spec):
    """What a judge may cost: a run that would go beyond stops with a checkpoint. Per process."""

    requests: Count | None = None
    """Requests, without the repetition of failed ones and without what the cache answers."""
    tokens: Count | None = None
    """Prompt and completion tokens as the server counts them; requests under way still finish."""


class JudgePriceSpec(Spec):
    """Prices per million tokens, in whatever currency: they become the metric `cost`."""

    prompt: NotNegative
    """Of the judge's input."""
    completion: NotNegative
    """Of its answers."""
