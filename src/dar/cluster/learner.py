"""The actor that trains: one rank of the loop that `dar train` runs in a single process."""

from __future__ import annotations

import io
import logging
import os
import queue
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from dar.assembly.loop import build_loop
from dar.assembly.training import TrainResult, run_loop
from dar.cluster.engine import RemoteEngine
from dar.cluster.job import Job, address, place
from dar.cluster.pool import Pool
from dar.cluster.rewards import remote_rewards
from dar.cluster.sampler import Weights
from dar.console import Console, show_logs
from dar.record.folder import RunFolder
from dar.run.loop import Loop


@dataclass(frozen=True)
class Crew:
    """Handles of all actors, in rank order; `places` of the learners for people, and where these meet."""

    samplers: Sequence[Any]
    reward_workers: Sequence[Any]
    learners: Sequence[Any]
    places: Sequence[str]
    meeting: tuple[str, int]


class _Stream(io.TextIOBase):
    """A file whose text goes to a queue, with the name of the stream that it stands for."""

    def __init__(self, name: str, to: queue.SimpleQueue[tuple[str, str]]) -> None:
        self._name, self._to = name, to

    def write(self, text: str) -> int:
        self._to.put((self._name, text))
        return len(text)


class Learner:
    """A rank. Its methods are called side by side: the others while `train` goes on."""

    _engine: RemoteEngine | None = None
    _loop: Loop | None = None
    _signal: str | None = None

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self._printed: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def place(self) -> tuple[str, tuple[str, int]]:
        """Where it is, for people, and an address and port that are free here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return place(), (address(), probe.getsockname()[1])

    def output(self) -> list[tuple[str, str]]:
        """What was printed since the last call, each with `stdout` or `stderr`; waits half a second for some."""
        found = []
        with suppress(queue.Empty):
            found.append(self._printed.get(timeout=0.5))
            while True:
                found.append(self._printed.get_nowait())
        return found

    def stop(self, name: str) -> None:
        """The driver got that signal: this step is finished first."""
        self._signal = name
        if self._loop is not None:
            self._loop.ask_to_stop(name)

    def weights(self) -> Weights | None:
        """Those that samplers are asked with now."""
        return self._engine and self._engine.weights

    def train(
        self, crew: Crew, *, resume: bool | Path, command: str, screen: Mapping[str, Any], overwrite: bool = False,
        **more: Any,
    ) -> TrainResult | None:  # fmt: skip
        """Builds and runs the loop, on a console with the user's screen's settings; its result on rank 0.

        Raises as `build_loop` and `run_loop`.
        """
        self.job.settle()
        self._behave(crew)
        objects = self._objects(crew)
        folder = RunFolder(self.job.spec.output_dir)
        has_begun = folder.environment().get("cluster", {}).get("run") == self.job.name
        resume, overwrite = has_begun or resume, overwrite and not has_begun
        console = Console(**screen)
        loop = build_loop(self.job.spec, objects, resume=resume, overwrite=overwrite, console=console, **more)
        self._loop = loop
        if self._signal is not None:
            loop.ask_to_stop(self._signal)
        result = run_loop(loop, resume=resume, command=command)
        return None if self.rank else result

    def _behave(self, crew: Crew) -> None:
        """What torchrun would tell torch and accelerate, and what the command line does with prints and warnings."""
        if len(crew.learners) > 1:
            # Ray lets each see its own device alone.
            ranks = {"RANK": self.rank, "WORLD_SIZE": len(crew.learners), "LOCAL_RANK": 0}
            where = dict(zip(("MASTER_ADDR", "MASTER_PORT"), crew.meeting))
            os.environ |= {name: str(value) for name, value in {**ranks, **where}.items()}
        if self.rank == 0:
            sys.stdout, sys.stderr = (_Stream(name, self._printed) for name in ("stdout", "stderr"))
        show_logs(logging.ERROR if self.rank else logging.WARNING, force=True)

    def _objects(self, crew: Crew) -> Any:
        """The run's objects, with those that stand for the other actors."""
        spec, cluster = self.job.spec, self.job.spec.cluster
        assert cluster is not None

        def pool(what: str, actors: Sequence[Any]) -> Pool:
            # Each rank begins with others, so that all are busy when the ranks ask at once.
            first = self.rank % len(actors)
            timeouts = {"patience": cluster.patience, "timeout": spec.runtime.rank_timeout}
            return Pool(what, [*actors[first:], *actors[:first]], **timeouts)

        samplers, workers = pool("sampler", crew.samplers), pool("reward worker", crew.reward_workers)
        single = [pool("reward worker", [actor]) for actor in crew.reward_workers]
        pools = [samplers, workers, *single]
        engine = self._engine = RemoteEngine(pools, crew.learners[0], spec.sampling.prompts_per_request)

        def facts() -> dict[str, Any]:
            scoring = ray.get([actor.describe.remote() for actor in crew.reward_workers])
            sampling = [where for where, _ in engine.described]
            places = {"learners": crew.places, "samplers": sampling, "reward_workers": scoring}
            return {"cluster": {"run": self.job.name, **places}}

        rewards, gold = (remote_rewards(self.job, kind, workers, single) for kind in ("rewards", "gold"))
        return replace(self.job.objects, engine=engine, rewards=rewards, gold=gold, facts=facts)
