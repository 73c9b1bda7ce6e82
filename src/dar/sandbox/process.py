"""One worker of a sandbox: started with little, spoken to through sockets, ended with everything it has started."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dar.sandbox.score import Failed

_SCRIPT = Path(__file__).with_name("worker.py")
_TOKEN = "DAR_SANDBOX"
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE")
"""The only variables a process gets: keys and tokens in the environment are none of a verifier's business."""
_MAX_LINE_BYTES = 2**16


class Lines:
    """Our end of a socket, and what the other end says, line by line: no more is read than a line may have."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.has_hung_up = False
        self._received = b""

    def receive(self) -> None:
        """Reads what there is."""
        with contextlib.suppress(BlockingIOError):
            while not self.has_hung_up and len(self._received) <= _MAX_LINE_BYTES:
                try:
                    found = self.end.recv(_MAX_LINE_BYTES)
                except ConnectionError:
                    found = b""
                self._received += found
                self.has_hung_up = not found

    def next_line(self) -> bytes | None:
        """The next whole line, or the beginning of one that is too long."""
        line, newline, rest = self._received.partition(b"\n")
        if not newline and len(line) <= _MAX_LINE_BYTES:
            return None
        self._received = rest
        return line


@dataclass
class Worker:
    """A process and what is known of it: ready, working on a row until a deadline, or gone.

    channel: to the worker itself. call: to the process of the call under way, which alone has the other end.
    idle_processes: its own when it was ready, those of the function's module among them.
    score: what the call has answered, once it `has_answered`.
    """

    process: subprocess.Popen[bytes]
    channel: Lines
    token: str
    deadline: float
    row: int | None = None
    is_ready: bool = False
    idle_processes: int = 0
    next_count: float = 0.0
    call: Lines | None = None
    unsent: bytes = b""
    score: float | Failed | None = None
    has_answered: bool = False

    def ask(self, row: int, request: dict[str, Any], timeout_seconds: float) -> None:
        """Sends a request; an answer is due before the time is over."""
        own, theirs = socket.socketpair()
        self.call, self.unsent, self.has_answered = Lines(own), pickle.dumps(request), False
        self.row = row
        self.deadline = time.monotonic() + timeout_seconds
        with theirs, contextlib.suppress(ConnectionError):  # that the worker is gone is seen by its silence
            socket.send_fds(self.channel.end, [b"."], [theirs.fileno()])
        self.send()

    def finish(self) -> None:
        """Nothing is due any more."""
        if self.call is not None:
            self.call.end.close()
        self.row = self.call = None
        self.unsent = b""
        self.deadline = math.inf

    def send(self) -> None:
        """Writes as much as the socket takes now."""
        with contextlib.suppress(BlockingIOError):
            while self.call is not None and self.unsent:
                try:
                    self.unsent = self.unsent[self.call.end.send(self.unsent) :]
                except ConnectionError:  # its process has ended without reading, which the worker will tell
                    self.unsent = b""

    def receive(self) -> None:
        """Reads what there is: first what the worker says, so that the answer of a call that has ended is whole."""
        self.channel.receive()
        if self.call is not None:
            self.call.receive()


def cause_of_death(code: int) -> str:
    """`signal SIGSEGV`, `exit code 3`."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def start_worker(hello: dict[str, Any], timeout_seconds: float) -> Worker:
    """Starts a process that is to load what `hello` says.

    Raises:
        OSError: no process can be started.
    """
    token = secrets.token_hex(16)
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {_TOKEN: token, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    own, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno()), json.dumps(hello)],
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the run
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            own.close()
            raise
    return Worker(process, Lines(own), token, deadline=time.monotonic() + timeout_seconds)


def num_processes(worker: Worker) -> int:
    """How many processes the worker has started, directly or not, that still run."""
    try:
        return len(psutil.Process(worker.process.pid).children(recursive=True))
    except psutil.Error:
        return 0


def end_worker(worker: Worker) -> None:
    """Kills a worker and everything it has started, and waits for it.

    All are stopped before any is killed: a stopped process forks no more, so the search comes to an end.
    """
    stopped: set[int] = set()
    while fresh := _family(worker) - stopped:
        for pid in fresh:
            _signal(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        _signal(pid, signal.SIGKILL)
    worker.process.wait()
    worker.channel.end.close()
    worker.finish()


def _family(worker: Worker) -> set[int]:
    """The worker, whoever else has its token in the environment, and all that these have started."""
    found = {worker.process.pid} if worker.process.poll() is None else set()
    parents: dict[int, int] = {}
    for process in psutil.process_iter(["ppid", "environ", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            parents[process.pid] = process.info["ppid"]
            if (process.info["environ"] or {}).get(_TOKEN) == worker.token:
                found.add(process.pid)
    while fresh := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= fresh
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)
