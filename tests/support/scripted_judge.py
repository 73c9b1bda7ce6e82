"""A small OpenAI-compatible server on loopback that says, or fails, what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Manner = Literal["whole", "drop", "half", "trickle", "silence", "endless", "raw"]


@dataclass(frozen=True)
class Answer:
    """What the server does with one request.

    manner: `whole` answers; `drop` closes the connection without a word; `half` stops in the middle of the body;
        `trickle` sends a byte at a time and never finishes; `silence` never answers; `endless` sends the body over and
        over; `raw` sends it alone, without a status or headers of its own.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    manner: Manner = "whole"


def said(
    text: str | None,
    tokens: Sequence[tuple[str, dict[str, float]]] = (),
    *,
    delay: float = 0.0,
    finish_reason: str = "stop",
) -> Answer:
    """A chat completion; `tokens` are (token, {candidate: log-probability})."""
    logprobs = None
    if tokens:
        content = [
            {
                "token": token,
                "logprob": candidates.get(token, -9999.0),
                "top_logprobs": [{"token": name, "logprob": value} for name, value in candidates.items()],
            }
            for token, candidates in tokens
        ]
        logprobs = {"content": content}
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
    }
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Answer(json.dumps(body).encode(), delay=delay)


def refused(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Answer:
    """An error answer in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Answer(body, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedJudge:
    """The server; use it in a `with`.

    Args:
        script: (the request's body, how often this very body was sent before) → what to do.
        port: 0 = any free one.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Answer], *, port: int = 0) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that gave up are part of the script

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedJudge:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            before = self.bodies.count(body)
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._answer(handler, self.script(body, before))
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        self._stopping.wait(answer.delay)
        if self._stopping.is_set() or answer.manner in ("drop", "silence"):
            if answer.manner == "silence":
                self._stopping.wait()
            handler.close_connection = True
            return
        if answer.manner == "raw":
            handler.wfile.write(answer.body)
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        if answer.manner == "endless":
            handler.end_headers()
            while not self._stopping.is_set():
                handler.wfile.write(answer.body)
        handler.send_header("content-length", str(len(answer.body)))
        handler.end_headers()
        if answer.manner == "whole":
            handler.wfile.write(answer.body)
            return
        handler.wfile.write(answer.body[: len(answer.body) // 2])
        handler.wfile.flush()
        for byte in answer.body[len(answer.body) // 2 : -1] if answer.manner == "trickle" else b"":
            if self._stopping.wait(0.05):
                break
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
        if answer.manner == "trickle":
            self._stopping.wait()
        handler.close_connection = True


def user_text(body: dict[str, Any]) -> str:
    """The user message of a request."""
    return body["messages"][1]["content"]


def between(text: str, tag: str) -> str:
    """What stands between two tags."""
    return text.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]
