"""Stands for a vLLM server with this library's plug-in: its API, on loopback, sampling with a policy of its own."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dar import __version__
from dar.batch import Prompt
from dar.config.data import DecodingSpec
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey
from support.engines import engine_of

Answer = tuple[int, Any]


class ScriptedVLLM:
    """asked: (path, body) of each request. failing: what is answered instead, by path. change: of each completion."""

    def __init__(self, policy: Policy) -> None:
        self.engine = engine_of(copy.deepcopy(policy), max_tokens=10_000)
        self.asked: list[tuple[str, Any]] = []
        self.failing: dict[str, Answer] = {}
        self.change: Callable[[dict[str, Any]], Any] = lambda choice: None
        self.weights, self.has_plugin = "default", True
        self._lock = threading.Lock()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                with scripted._lock:
                    scripted.asked.append((self.path, body))
                    status, found = scripted.failing.get(self.path) or scripted.answer(self.path, body)
                said = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def paths(self) -> list[str]:
        """What was asked, each run of the same once."""
        return [path for at, (path, _) in enumerate(self.asked) if at == 0 or self.asked[at - 1][0] != path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: Any) -> Answer:
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "theirs"}]}
        if path == "/finish_weight_update":
            self.weights = body["weight_version"]
        if path == "/inference/v1/generate":
            return self.generate(body)
        return 200, {"success": True}

    def generate(self, body: dict[str, Any]) -> Answer:
        params = body["sampling_params"]
        own = params["extra_args"]["dar"]
        if own["version"] != __version__ and self.has_plugin:
            return 400, {"error": {"message": f"this server draws tokens with dar {__version__}"}}
        if "key" not in own:
            return 200, {"choices": []}
        position, number = own["place"]
        rollouts = self.engine.generate(
            [Prompt(position, "", tuple(body["token_ids"]), {})], number + 1, key=SamplingKey(*own["key"]),
            max_completion_length=params["max_tokens"], decoding=DecodingSpec(**own["decoding"]),
        )  # fmt: skip
        length = int(rollouts.groups.lengths[number])
        choice = {
            "token_ids": rollouts.groups.completion_ids[number, :length].tolist(),
            "logprobs": {"content": [{"logprob": each} for each in rollouts.logprobs[number, :length].tolist()]},
            "finish_reason": "stop" if rollouts.finish_reasons[number] == "eos" else "length",
            "weight_versions": [{"version": self.weights, "start": 0, "end": length}],
        }
        self.change(choice)
        return 200, {"model": body["model"], "choices": [choice]}
