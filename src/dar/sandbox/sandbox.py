"""User code in processes of its own: a function that hangs, crashes, eats memory or forks costs one score.

This protects a run from mistakes and from what completions make verifiers do. What comes from there is not believed: a
call can spoil its own score and no other. It is no wall against hostile code: a process has the account's files and
network.
"""

from __future__ import annotations

import os
import selectors
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dar.config.verifiable import SandboxSpec
from dar.errors import ConfigError, RewardError
from dar.files.imports import located
from dar.files.intake import parse_json
from dar.sandbox.process import Worker, cause_of_death, end_worker, num_processes, start_worker
from dar.sandbox.score import Failed, finite_float

_START_SECONDS = 300.0
"""Most a worker may take to import its function: heavy packages on a busy machine take a minute."""
_TICK_SECONDS = 0.25
"""How often the processes of calls under way are counted."""
_MAX_FAILED_STARTS = 3
_NONSENSE = "its process sent something that is no answer"


class Sandbox:
    """A pool of processes that call one function; killed ones are replaced, all end with the pool.

    Args:
        function: `package.module:function`, found as in a recipe: on the path, or in the working directory.
        spec: how many processes there are, and what one call may use.
        is_trusted: the function runs nothing that completions hold as code, so calls may follow each other in one
            process, which is much faster. Otherwise each has its own, made from what the module was after its import.
    """

    def __init__(self, function: str, spec: SandboxSpec, *, is_trusted: bool = False) -> None:
        self.function = function
        self.is_trusted = is_trusted
        self.spec = spec
        self.parameters: list[str] | None = None
        """Names the function takes, once a worker is ready; None for all."""
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._finalizer = weakref.finalize(self, _end_all, self._workers, os.getpid())

    def start(self) -> None:
        """Waits until one worker has loaded the function.

        Raises:
            ConfigError: it cannot be loaded, or not within five minutes.
            RewardError: processes cannot be started.
        """
        if os.name != "posix":
            raise ConfigError(f"reward {self.function}: a sandbox needs Linux or another POSIX system")
        while not any(worker.is_ready for worker in self._workers):
            self._staff(self.spec.workers)
            self._progress()

    def map(self, requests: Sequence[Mapping[str, Any]]) -> list[float | Failed | None]:
        """Calls the function once for each request, as many at a time as there are workers.

        Args:
            requests: keyword arguments; all that the function does not name are left out.

        Returns:
            In the order of the requests, the one value that each call returned, or `Failed` with what happened to it.

        Raises:
            ConfigError: the function cannot be loaded.
            RewardError: processes cannot be started.
        """
        self.start()
        results: list[float | Failed | None] = [None] * len(requests)
        waiting = deque(enumerate(requests))
        busy = 0
        try:
            while waiting or busy:
                self._staff(min(self.spec.workers, len(waiting) + busy))
                for worker in self._workers:
                    if worker.is_ready and worker.row is None and waiting:
                        row, request = waiting.popleft()
                        named = request.keys() if self.parameters is None else request.keys() & self.parameters
                        worker.ask(row, {name: request[name] for name in named}, self.spec.timeout_seconds)
                        busy += 1
                for row, result in self._progress():
                    results[row] = result
                    busy -= 1
        except BaseException:
            self._end([worker for worker in self._workers if worker.row is not None])
            raise
        return results

    def close(self) -> None:
        """Ends every process. The next call starts new ones."""
        self._end(self._workers)

    def _staff(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            here, (folder, module, name) = str(Path.cwd()), located(self.function)
            hello = {
                "function": f"{module}:{name}",
                "path": [folder, here, *(entry or here for entry in sys.path)],
                "is_trusted": self.is_trusted,
                "memory_bytes": int(self.spec.memory_gb * 2**30),
                "cpu_seconds": self.spec.timeout_seconds * (os.cpu_count() or 1),
            }
            try:
                self._workers.append(start_worker(hello, _START_SECONDS))
            except OSError as error:
                raise RewardError(f"reward {self.function}: no process can be started for it: {error}") from error

    def _progress(self) -> list[tuple[int, float | Failed | None]]:
        """Waits for something to happen; the rows that were settled by it."""
        now = time.monotonic()
        patience = min([_TICK_SECONDS, *(max(0.0, worker.deadline - now) for worker in self._workers)])
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.channel.end, selectors.EVENT_READ)
                call = worker.call
                if call is not None and not worker.has_answered and not call.has_hung_up:
                    selector.register(call.end, selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0))
            selector.select(patience)
        outcomes = [self._outcome(worker) for worker in list(self._workers)]
        return [outcome for outcome in outcomes if outcome is not None]

    def _outcome(self, worker: Worker) -> tuple[int, float | Failed | None] | None:
        """What a worker's latest news, or its silence, means for the row it works on; it is ended where it must be."""
        is_dead = worker.process.poll() is not None  # before its last words are read, so that none are missed
        worker.send()
        worker.receive()
        try:
            if worker.call is not None and not worker.has_answered and (line := worker.call.next_line()) is not None:
                worker.score, worker.has_answered = _score(line), True
            line = worker.channel.next_line()
            message = None if line is None else parse_json(line.decode(), "what a worker says")
        except ValueError:
            return self._lost(worker, _NONSENSE)
        if line is not None:
            return self._told(worker, message)
        if is_dead or worker.channel.has_hung_up:
            return self._lost(worker, "its process was ended by {cause}")
        now = time.monotonic()
        if now > worker.deadline:
            seconds = self.spec.timeout_seconds if worker.is_ready else _START_SECONDS
            return self._lost(worker, f"it took longer than {seconds:g} s")
        if worker.row is not None and now > worker.next_count:
            worker.next_count = now + _TICK_SECONDS
            # One more is the call's own.
            if num_processes(worker) - worker.idle_processes - 1 > self.spec.max_processes:
                return self._lost(worker, f"it had started more than {self.spec.max_processes} processes")
        return None

    def _told(self, worker: Worker, message: Any) -> tuple[int, float | Failed | None] | None:
        """What a worker says of itself: that it is ready, or cannot be, or that the call's process has ended."""
        match message:
            case {"error": str(error)} if not worker.is_ready:
                self._end([worker])
                raise ConfigError(f"reward {self.function} cannot be loaded in its sandbox: {error}")
            case {"parameters": None | list() as parameters} if not worker.is_ready:
                self.parameters = parameters
                self._failed_starts = 0
                worker.is_ready, worker.idle_processes = True, num_processes(worker)
                worker.finish()
            case {"ended": int(code)} if worker.row is not None:
                row, score = worker.row, worker.score
                if not worker.has_answered:
                    score = Failed(f"its process was ended by {cause_of_death(code)}")
                worker.finish()
                return row, Failed(f"{self.function}: {score.reason}") if isinstance(score, Failed) else score
            case _:
                return self._lost(worker, _NONSENSE)
        return None

    def _lost(self, worker: Worker, reason: str) -> tuple[int, Failed] | None:
        """Ends a worker that will give no answer; a row it worked on has failed."""
        row = worker.row
        self._end([worker])
        reason = reason.format(cause=cause_of_death(worker.process.returncode))
        if row is not None:
            return row, Failed(f"{self.function}: {reason}")
        if not worker.is_ready:
            self._failed_starts += 1
        if self._failed_starts == _MAX_FAILED_STARTS:
            raise ConfigError(
                f"reward {self.function} cannot be loaded in its sandbox: {_MAX_FAILED_STARTS} processes in a row did "
                f"not get ready. The last: {reason}"
            )
        return None

    def _end(self, workers: Sequence[Worker]) -> None:
        for worker in list(workers):
            self._workers.remove(worker)
            end_worker(worker)


def _score(line: bytes) -> float | Failed | None:
    """What an answer says, which was written where foreign code ran.

    Raises:
        ValueError: it is none.
    """
    match parse_json(line.decode(), "the answer"):
        case {"failed": str(reason)}:
            return Failed(reason[:500])
        case {"value": None}:
            return None
        case {"value": bool() | int() | float() as value}:
            number = finite_float(value)
            return Failed(f"it returned {value!r:.200}, which is not a finite number") if number is None else number
    raise ValueError("not an answer")


def _end_all(workers: list[Worker], owner: int) -> None:
    # A process forked from the owner, as data loaders do, has the list but not the right.
    if os.getpid() == owner:
        while workers:
            end_worker(workers.pop())
