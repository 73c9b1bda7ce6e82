"""Talking to a vLLM server."""

from __future__ import annotations

import json
import os
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from dar.errors import RolloutError
from dar.shown import one_line


class NoAnswer(Exception):
    """The server is gone, late, or has failed: another one may do better."""


class Refused(RolloutError):
    """The server does not do what it was asked, and would not if it was asked again."""


class Client:
    """JSON to a server and back; `timeout` is in seconds. A key in VLLM_API_KEY, vLLM's own variable, is sent along."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self._opener = build_opener(ProxyHandler({}))

    def ask(self, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The answer to a POST with a body, else to a GET; None where it is no JSON.

        Raises:
            NoAnswer: there is none, or it is one of the server's own failures (5xx).
            Refused: it is an error of another kind.
        """
        where, key = self.url + path, os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = Request(where, None if body is None else json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=timeout or self.timeout) as response:
                found = response.read()
        except HTTPError as error:
            said = one_line(f"{where} answers {error.code}: {error.read().decode(errors='replace')}", 700)
            raise NoAnswer(said) if error.code >= 500 else Refused(said) from None
        except (OSError, HTTPException) as error:
            raise NoAnswer(one_line(f"{where}: {type(error).__name__}: {error}")) from None
        try:
            return json.loads(found)
        except ValueError:
            return None
