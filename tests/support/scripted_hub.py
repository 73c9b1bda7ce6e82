"""The Hub on loopback, as far as an upload needs it: whose a token is, new repositories and branches, and commits."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest


class ScriptedHub:
    """The server; use it in a `with`, in which huggingface_hub asks it with the token `hf_test`.

    account: what it says of the token; None if it knows none. status: with which it answers a commit.
    made: bodies of requests for new repositories. commits: (repository, branch, {file: bytes}) of each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.account: dict[str, Any] | None = {"name": "me", "orgs": [{"name": "lab"}]}
        self.status = 200
        self.made: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, hub.account or {"error": "who?"}, 200 if hub.account else 401)

            def do_POST(self) -> None:
                hub._serve(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    def __enter__(self) -> ScriptedHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        assert handler.headers["authorization"] == "Bearer hf_test"
        path = handler.path.partition("?")[0]
        if path == "/api/repos/create":
            self.made.append(found := json.loads(body))
            owner = found.get("organization") or "me"
            return self._answer(handler, {"url": f"{self.url}/{owner}/{found['name']}"})
        if path == "/api/validate-yaml":
            return self._answer(handler, {"errors": [], "warnings": []})
        parts = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        assert parts is not None, path
        repository, kind, branch = parts.groups()
        if kind == "branch":
            self.branches.append(branch)
            return self._answer(handler, {})
        if kind == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]
            return self._answer(handler, {"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        if self.status == 200:
            found = {each["path"]: base64.b64decode(each["content"]) for each in files}
            self.commits.append((repository, branch, found))
        address = f"{self.url}/{repository}/commit/{'a' * 40}"
        return self._answer(handler, {"commitUrl": address, "commitOid": "a" * 40, "success": True}, self.status)

    def _answer(self, handler: BaseHTTPRequestHandler, found: Any, status: int = 200) -> None:
        body = json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
