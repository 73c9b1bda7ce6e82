"""`dar watch`: the report of a run that goes on, served to a browser on this machine. It reads, and nothing else."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dar.errors import ConfigError, DarError
from dar.report.page import render_page
from dar.report.run import load_trainings

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ReportServer(ThreadingHTTPServer):
    """Serves `/`, the page, and `/version`, which changes when the run's files do; GET and HEAD only.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, folders: list[Path], host: str, port: int) -> None:
        self.folders = folders
        self.host = host
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] | None = None
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}, port {port}: {error}. Choose another with --port.") from error

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_address[1]}/"

    def version(self) -> str:
        """Of the state of the run folders: a hash of their files' names, sizes and times."""
        state = hashlib.sha256()
        for folder in self.folders:
            files = [*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/completions/*")]
            for file in sorted(file for file in files if file.suffix in (".jsonl", ".yaml", ".parquet", ".json")):
                try:
                    found = file.stat()
                except FileNotFoundError:  # renamed between the look into the folder and this one
                    continue
                state.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return state.hexdigest()[:16]

    def page(self) -> bytes:
        """The page of the newest state, rendered once for all who ask.

        Raises:
            DarError: the run folders cannot be read.
        """
        with self._lock:
            version = self.version()
            if self._page is None or self._page[0] != version:
                self._page = version, render_page(load_trainings(self.folders), version=version).encode()
            return self._page[1]

    def accepts(self, host: str | None) -> bool:
        """Whether a request's Host names this server.

        A page elsewhere can point a name of its own at 127.0.0.1 and read answers as its own; what it cannot do is make
        a browser send an address, `localhost` or this machine's name as Host.
        """
        name = (host or "").rpartition(":")[0] if (host or "").rpartition(":")[2].isdigit() else host or ""
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", self.host.lower(), socket.gethostname().lower()}
        return True


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride] - always the one above
    server_version = "dar"
    sys_version = ""

    def do_GET(self) -> None:
        if not self.server.accepts(self.headers.get("Host")):
            self._send(HTTPStatus.FORBIDDEN, b"This server answers to its address and to localhost only.\n")
        elif self.path == "/version":
            self._send(HTTPStatus.OK, self.server.version().encode())
        elif self.path == "/":
            try:
                self._send(HTTPStatus.OK, self.server.page(), kind="text/html")
            except DarError as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, b"There is / and /version, and nothing else.\n")

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, body: bytes, *, kind: str = "text/plain") -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for every question about news would bury what the terminal is for."""
