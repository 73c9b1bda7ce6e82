"""One exchange with a judge's server: what goes out goes to one origin, and what comes back is bounded."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dar.errors import RewardError
from dar.judge.reply import MalformedReply

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

_MAX_REDIRECTS = 5
_ERROR_BYTES = 64 << 10
"""What is read of an answer with an error status; the rest of it is left."""
_COMPRESSED = ("gzip", "x-gzip", "deflate")
_EITHER = zlib.MAX_WBITS | 32


@dataclass(frozen=True)
class Answer:
    """What came back: the status, the body after decompression, and how long to wait, as the server says it."""

    status: int
    body: bytes
    retry_after: str | None


async def post(connection: AsyncClient, url: str, question: Mapping[str, Any], *, max_bytes: int) -> Answer:
    """Sends JSON and reads what comes back. Redirects are followed within the origin of `url`.

    Raises:
        UnicodeEncodeError: the question has text that cannot be sent.
        httpx2.HTTPError: the connection failed.
        MalformedReply: the answer has more than `max_bytes`, or cannot be decompressed.
        RewardError: the server redirects to another origin.
    """
    content = json.dumps(question, ensure_ascii=False).encode()
    request = connection.build_request("POST", url, content=content, headers={"Content-Type": "application/json"})
    for _ in range(_MAX_REDIRECTS):
        response = await connection.send(request, stream=True)
        try:
            following = response.next_request
            if following is None:
                body = await _body(response, max_bytes)
                return Answer(response.status_code, body, response.headers.get("retry-after"))
        finally:
            await response.aclose()
        here, there = (f"{sent.url.scheme}://{sent.url.netloc.decode()}" for sent in (request, following))
        if request.url.origin != following.url.origin:
            raise RewardError(
                f"the judge's server {here} redirects to {there}, and prompts and completions are sent to no other "
                "origin than that of base_url. If the judge is there, set base_url to it."
            )
        request = following
    raise MalformedReply(f"a redirect, after {_MAX_REDIRECTS} others")


async def _body(response: Response, max_bytes: int) -> bytes:
    """The body, decompressed; of an answer with an error status its beginning is enough."""
    limit = max_bytes if response.is_success else _ERROR_BYTES
    raw = bytearray()
    async with contextlib.aclosing(response.aiter_raw()) as parts:
        async for part in parts:
            raw += part
            if len(raw) > limit:
                break
    encoding = response.headers.get("content-encoding", "").strip().lower()
    body = bytes(raw)
    if encoding in _COMPRESSED:
        try:
            # One byte more than the limit, and a small body that would become a large one is known.
            body = zlib.decompressobj(_EITHER).decompress(raw, limit + 1)
        except zlib.error:
            raise MalformedReply(f"not {encoding}, which it says it is") from None
    if response.is_success and max(len(raw), len(body)) > limit:
        raise MalformedReply(f"longer than {limit:,} bytes, more than the tokens that were asked for can come to")
    return body[:limit]
