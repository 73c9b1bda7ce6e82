"""Asking an OpenAI-compatible endpoint: bounded concurrency, a deadline per attempt, and patience with its failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from dar.config.judge import JudgeBudgetSpec, JudgeEndpointSpec, JudgePriceSpec
from dar.errors import ConfigError, RewardError
from dar.judge.budget import Budget
from dar.judge.counts import Counts
from dar.judge.reply import MalformedReply, Reply, read_reply
from dar.judge.retry import Backoff, retry_after_seconds
from dar.judge.template import Messages
from dar.rewards import Failed
from dar.shown import keep_secret, one_line

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

_MALFORMED_TRIES = 3
"""How often a request may be answered with what is no chat completion: such answers may have to be paid for."""
_RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may pass by themselves."""
_HOPELESS = frozenset({401, 403, 404})
"""Statuses that every other request would get too."""
_LEAST_BYTES, _MOST_BYTES, _CANDIDATE_BYTES = 2 << 20, 64 << 20, 512
"""What an answer may hold whatever was asked for, at most, and for each candidate of each token."""
_ERROR_BYTES = 64 << 10
_MAX_REDIRECTS = 5


def sampling(endpoint: JudgeEndpointSpec) -> dict[str, Any]:
    """What of a request decides over the answer, beside its messages."""
    found: dict[str, Any] = {"temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
    if endpoint.top_logprobs:
        found |= {"logprobs": True, "top_logprobs": endpoint.top_logprobs}
    # `max_tokens: null` among the parameters takes it out, for servers that know it under another name.
    return {name: value for name, value in (found | endpoint.parameters).items() if value is not None}


def max_bytes(endpoint: JudgeEndpointSpec) -> int:
    """Most bytes that are read of an answer, after decompression."""
    asked = sampling(endpoint).items()
    tokens = max((value for name, value in asked if "tokens" in name and isinstance(value, int)), default=0)
    return min(_LEAST_BYTES + _CANDIDATE_BYTES * tokens * (1 + endpoint.top_logprobs), _MOST_BYTES)


def _key(endpoint: JudgeEndpointSpec) -> str | None:
    """The key that the environment holds, from now on a secret; None where none is wanted.

    Raises:
        ConfigError: it holds none under that name, or one that cannot be sent.
    """
    name = endpoint.api_key_env
    if name is None:
        return None
    if not (key := os.environ.get(name)):
        raise ConfigError(
            f"the judge's key is to come from the environment variable {name}, which is not set: export it, or remove "
            "api_key_env for a server that wants no key"
        )
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        # As a header it would be refused, and the refusal would show it.
        raise ConfigError(
            "the judge's key begins or ends with white space, or has characters that no HTTP header can have, "
            "such as the end of a line: set the environment variable that api_key_env names without them"
        )
    keep_secret(key)
    return key


class _Refused(Exception):
    """An answer with an error status that asking again would not change."""


class _Unanswered(Exception):
    """An attempt that failed, and may succeed the next time."""

    def __init__(self, problem: str, retry_after: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class Client:
    """Asks one endpoint.

    Args:
        endpoint: where and how.
        budget: of requests and tokens, shared by all sessions; by default there is no bound.
        price: of the tokens; without one there is no cost.
        backoff: how long to wait between attempts.

    Raises:
        ConfigError: the environment has no key that can be sent under the endpoint's `api_key_env`.
    """

    def __init__(
        self,
        endpoint: JudgeEndpointSpec,
        *,
        budget: JudgeBudgetSpec | None = None,
        price: JudgePriceSpec | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.budget = Budget(budget or JudgeBudgetSpec())
        self.counts = Counts(price)
        self._api_key = _key(endpoint)
        self.backoff = backoff or Backoff()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Connections for one batch of requests; they belong to the running event loop."""
        # Some tenths of a second that only those who ask a judge need to wait.
        from httpx2 import AsyncClient, Limits  # noqa: PLC0415

        headers = {"Accept-Encoding": "gzip, deflate", "Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        # Neither the clock nor the number of connections is left to the client: see `_attempt` and `ask`.
        async with AsyncClient(headers=headers, timeout=None, limits=Limits()) as connection:
            yield Session(self, connection)


class Session:
    """Connections to the endpoint, and the places of those who may use them at once."""

    def __init__(self, client: Client, connection: AsyncClient) -> None:
        self._client = client
        self._connection = connection
        self._failing_since: float | None = None
        """Since when nobody was answered. All share it, so that those that were still waiting for their turn when the
        server went away do not each wait out its whole absence again."""
        self._places = asyncio.Semaphore(client.endpoint.concurrency)

    async def ask(self, messages: Messages) -> Reply | Failed:
        """The judge's reply; `Failed` where it refuses this request, or its failures outlast the patience.

        Raises:
            BudgetError: the budget is used up.
            RewardError: it would refuse every other request too.
        """
        client = self._client
        async with self._places:
            client.budget.begin()
            client.counts.requests += 1
            answer = await self._ask_patiently(messages)
        if isinstance(answer, Failed):
            client.counts.failures += 1
        return answer

    async def _ask_patiently(self, messages: Messages) -> Reply | Failed:
        endpoint = self._client.endpoint
        first_failure: float | None = None
        attempt = malformed = 0
        while True:
            try:
                return await self._attempt(messages)
            except _Refused as error:
                return Failed(f"the judge refused the request: {error}")
            except MalformedReply as error:
                malformed += 1
                if malformed == _MALFORMED_TRIES:
                    return Failed(f"the judge's answer was {malformed} times {error}")
                problem, retry_after = str(error), None
            except _Unanswered as error:
                problem, retry_after = str(error), error.retry_after
            now = time.monotonic()
            self._failing_since = now if self._failing_since is None else self._failing_since
            first_failure = now if first_failure is None else first_failure
            delay = self._client.backoff.delay(attempt, retry_after)
            if now + delay - min(first_failure, self._failing_since) > endpoint.patience:
                waiting = f", and asked for {retry_after:.0f} s more" if retry_after else ""
                return Failed(
                    f"the judge at {endpoint.base_url} gave no answer within {endpoint.patience:g} s of patience "
                    f"(attempts: {attempt + 1}{waiting}); the last problem: {problem}"
                )
            self._client.counts.retries += 1
            attempt += 1
            await asyncio.sleep(delay)

    async def _attempt(self, messages: Messages) -> Reply:
        """One request."""
        from httpx2 import HTTPError  # noqa: PLC0415 - loaded by the session

        endpoint, client = self._client.endpoint, self._client
        roles = {"system": messages.system, "user": messages.user}
        question = {
            "model": endpoint.model,
            "messages": [{"role": role, "content": text} for role, text in roles.items()],
            **sampling(endpoint),
        }
        url = endpoint.base_url + "/chat/completions"
        started = time.monotonic()
        try:
            # The deadline is on the whole: a server that sends a byte now and then never makes a read time out.
            async with asyncio.timeout(endpoint.timeout):
                status, body, retry_after = await self._post(url, json.dumps(question, ensure_ascii=False).encode())
        except TimeoutError:
            raise _Unanswered(f"no answer within {endpoint.timeout:g} s") from None
        except UnicodeEncodeError as error:
            raise _Refused(f"the question cannot be sent: {error.reason}") from None
        except HTTPError as error:
            raise _Unanswered(one_line(f"{type(error).__name__}: {error}")) from None
        if not 200 <= status < 300:
            raise self._judged(status, body, retry_after)
        self._failing_since = None
        reply = read_reply(body)
        client.counts.latencies.append(time.monotonic() - started)
        client.counts.prompt_tokens += reply.prompt_tokens
        client.counts.completion_tokens += reply.completion_tokens
        client.budget.tokens += reply.prompt_tokens + reply.completion_tokens
        return reply

    async def _post(self, url: str, question: bytes) -> tuple[int, bytes, str | None]:
        """Status, body and Retry-After of what comes back; redirects are followed within the origin."""
        request = self._connection.build_request("POST", url, content=question)
        for _ in range(_MAX_REDIRECTS):
            response = await self._connection.send(request, stream=True)
            async with contextlib.aclosing(response):
                following = response.next_request
                if following is None:
                    body = await _body(response, max_bytes(self._client.endpoint))
                    return response.status_code, body, response.headers.get("retry-after")
            here, there = (f"{sent.url.scheme}://{sent.url.netloc.decode()}" for sent in (request, following))
            if request.url.origin != following.url.origin:
                raise RewardError(
                    f"the judge's server {here} redirects to {there}, and prompts and completions are sent to no other "
                    "origin than that of base_url. If the judge is there, set base_url to it."
                )
            request = following
        raise MalformedReply(f"a redirect, after {_MAX_REDIRECTS - 1} others")

    def _judged(self, status: int, body: bytes, retry_after: str | None) -> Exception:
        """What an error status means for this request, and for the others."""
        endpoint = self._client.endpoint
        message, code = _error(body)
        said = one_line(f"{status}: {message}")
        if status in _HOPELESS or code == "insufficient_quota":
            return RewardError(
                f"the judge at {endpoint.base_url} does not serve model '{endpoint.model}' to us ({said}). "
                "Check base_url, model and the environment variable that api_key_env names."
            )
        if status in _RETRIED or status >= 500:
            return _Unanswered(said, retry_after_seconds(retry_after))
        return _Refused(said)


async def _body(response: Response, max_bytes: int) -> bytes:
    """The body, decompressed; of an answer with an error status its beginning is enough.

    Raises:
        MalformedReply: it is longer, or cannot be decompressed.
    """
    limit = max_bytes if response.is_success else _ERROR_BYTES
    body = bytearray()
    async with contextlib.aclosing(response.aiter_raw()) as parts:
        async for part in parts:
            body += part
            if len(body) > limit:
                break
    is_long = len(body) > limit
    if response.headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip", "deflate"):
        try:
            body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, limit + 1)
        except zlib.error:
            raise MalformedReply("not compressed as it says") from None
    if response.is_success and (is_long or len(body) > limit):
        raise MalformedReply(f"longer than {limit:,} bytes, more than the tokens that were asked for come to")
    return bytes(body[:limit])


def _error(body: bytes) -> tuple[str, Any]:
    """What the server says of an error, and its name for it."""
    text = body.decode(errors="replace") or "no more than that"
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found["message"] or text), found.get("code")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return text, None
