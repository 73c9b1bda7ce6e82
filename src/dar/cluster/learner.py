"""The actor that trains: one rank of the loop that `dar train` runs in a single process."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from dar.assembly.loop import build_loop
from dar.assembly.training import TrainResult, run_loop
from dar.cluster.engine import RemoteEngine
from dar.cluster.job import Job, address, place
from dar.cluster.pool import Pool
from dar.cluster.rewards import remote_rewards
from dar.cluster.sampler import Weights
from dar.console import Console, LogHandler
from dar.run.folder import RunFolder
from dar.run.loop import Loop


@dataclass(frozen=True)
class Start:
    """What a rank is told when it begins.

    samplers, reward_workers: handles of all.
    learners: where they are, for people, in rank order.
    main: handle of rank 0.
    meeting: address and port where the ranks find each other.
    resume, overwrite, allow_changed_recipe, quiet, command: as of `build_loop` and `run_loop`.
    screen: settings of a console that is as wide as the user's, and knows as much.
    """

    samplers: Sequence[Any]
    reward_workers: Sequence[Any]
    learners: Sequence[str]
    main: Any
    meeting: tuple[str, int]
    resume: bool
    overwrite: bool
    allow_changed_recipe: bool
    quiet: bool
    command: str
    screen: Mapping[str, Any]


class Outbox:
    """What is printed here, as standard output or standard error, until the driver takes it."""

    def __init__(self) -> None:
        self._lines: list[tuple[bool, str]] = []
        self._has_some = threading.Condition()

    def put(self, is_error: bool, text: str) -> None:
        with self._has_some:
            self._lines.append((is_error, text))
            self._has_some.notify()

    def take(self, patience: float) -> list[tuple[bool, str]]:
        """All of it, as (whether it is for standard error, text); waits so many seconds for some."""
        with self._has_some:
            self._has_some.wait_for(lambda: self._lines, patience)
            found, self._lines = self._lines, []
        return found


class _Stream(io.TextIOBase):
    def __init__(self, outbox: Outbox, is_error: bool) -> None:
        self._outbox, self._is_error = outbox, is_error

    def write(self, text: str) -> int:
        self._outbox.put(self._is_error, text)
        return len(text)


class Learner:
    """A rank. Its methods are called side by side: the others while `train` goes on."""

    def __init__(self, job: Job, rank: int) -> None:
        job.settle()
        self.job, self.rank = job, rank
        self._outbox = Outbox()
        self._engine: RemoteEngine | None = None
        self._loop: Loop | None = None
        self._asked_to_stop: str | None = None

    def place(self) -> tuple[str, tuple[str, int]]:
        """Where it is, for people, and an address and port that are free here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return place(), (address(), probe.getsockname()[1])

    def output(self, patience: float = 0.5) -> list[tuple[bool, str]]:
        """What was printed since the last call; waits so many seconds for some."""
        return self._outbox.take(patience)

    def stop(self, name: str) -> None:
        """The driver got that signal: this step is finished first."""
        self._asked_to_stop = name
        if self._loop is not None:
            self._loop.ask_to_stop(name)

    def weights(self) -> Weights | None:
        """Those that samplers are asked with now."""
        return self._engine and self._engine.weights

    def train(self, start: Start) -> TrainResult | None:
        """Builds and runs the loop; its result on rank 0. Raises as `build_loop` and `run_loop`."""
        self.job.settle()
        self._join(start)
        spec, cluster = self.job.spec, self.job.spec.cluster
        assert cluster is not None
        if self.rank == 0:
            sys.stdout, sys.stderr = _Stream(self._outbox, False), _Stream(self._outbox, True)
        # As the command line has it: what the first rank warns of, all do.
        level = logging.ERROR if self.rank else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", handlers=[LogHandler()], force=True)
        logging.captureWarnings(True)
        warnings.filterwarnings("ignore", category=FutureWarning)

        def pool(what: str, actors: Sequence[Any]) -> Pool:
            # Each rank begins with others, so that all are busy when the ranks ask at once.
            first = self.rank % len(actors)
            return Pool(what, [*actors[first:], *actors[:first]], cluster, timeout=spec.runtime.rank_timeout)

        samplers = pool("sampler", start.samplers)
        workers = pool("reward worker", start.reward_workers)
        single = [pool("reward worker", [actor]) for actor in start.reward_workers]
        engine = self._engine = RemoteEngine(
            samplers, [samplers, workers, *single], start.main if self.rank else None,
            spec.sampling.prompts_per_request,
        )  # fmt: skip

        def facts() -> dict[str, Any]:
            scoring = ray.get([actor.describe.remote() for actor in start.reward_workers])
            sampling = [where for where, _ in engine.described]
            places = {"learners": start.learners, "samplers": sampling, "reward_workers": scoring}
            return {"cluster": {"run": self.job.name, **places}}

        has_begun = RunFolder(spec.output_dir).environment().get("cluster", {}).get("run") == self.job.name
        resume = start.resume or has_begun
        loop = build_loop(
            spec,
            replace(
                self.job.objects,
                engine=engine,
                rewards=remote_rewards(self.job, "rewards", workers, single),
                gold=remote_rewards(self.job, "gold", workers, single),
                facts=facts,
            ),
            resume=resume,
            overwrite=start.overwrite and not has_begun,
            allow_changed_recipe=start.allow_changed_recipe,
            quiet=start.quiet,
            console=Console(**start.screen),
        )
        self._loop = loop
        if self._asked_to_stop is not None:
            loop.ask_to_stop(self._asked_to_stop)
        result = run_loop(loop, resume=resume, command=start.command)
        return None if self.rank else result

    def _join(self, start: Start) -> None:
        """Tells torch and accelerate what torchrun would."""
        if len(start.learners) > 1:
            address, port = start.meeting
            os.environ |= {
                "RANK": str(self.rank),
                "WORLD_SIZE": str(len(start.learners)),
                "LOCAL_RANK": "0",  # of the devices that Ray lets it see
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
