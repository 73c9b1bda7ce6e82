"""The driver of a run on a cluster: places its processes, shows what the first rank prints, starts dead ones again."""

from __future__ import annotations

import os
import pickle
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dar.assembly.objects import NOTHING, Objects
from dar.assembly.training import TrainResult
from dar.cluster.job import Job, address
from dar.cluster.learner import Crew, Learner
from dar.cluster.pool import LOGS, own_error
from dar.cluster.rewards import RewardWorker
from dar.cluster.sampler import Sampler
from dar.config.cluster import ClusterSpec
from dar.config.run import RunSpec
from dar.console import Console
from dar.errors import ClusterError, ConfigError, DarError, RankError
from dar.run.stopping import signals_handled

_GRACE = 15.0
"""Seconds between a rank's error and the end of the others: they may be about to say more of it."""


class LostLearner(Exception):
    """A rank has died."""


def train(
    spec: RunSpec,
    cluster: ClusterSpec,
    objects: Objects = NOTHING,
    *,
    console: Console | None = None,
    quiet: bool = False,
    **settings: Any,
) -> TrainResult:
    """Runs a recipe on a cluster.

    Args:
        spec, cluster: the recipe, and its cluster.
        objects: to build it of; they are pickled.
        console, quiet, settings: as of `build_loop` and `run_loop`.

    Raises:
        ConfigError: there is no such cluster, or too little of it; an object cannot be elsewhere.
        ClusterError: more actors have died than may.
        DarError: as `build_loop` and `run_loop`.
    """
    console = console or Console()
    local = {"model": objects.model, "ref_model": objects.reference, "callbacks": objects.callbacks or None}
    if names := [name for name, value in local.items() if value is not None]:
        raise ConfigError(
            f"{' and '.join(names)} live in this process, and a run on a cluster goes on in others: give models by "
            "their path, and leave callbacks out"
        )
    try:
        cloudpickle.dumps(objects)  # pyright: ignore[reportPrivateImportUsage]
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(f"an argument cannot be sent to the processes of a cluster: {error}") from error
    names = ("width", "color_system", "stderr")
    screen = {"force_terminal": console.is_terminal, **{name: getattr(console, name) for name in names}}
    num_processes = cluster.learners + cluster.samplers + cluster.reward_workers
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // num_processes) if cluster.address == "local" else 1
    with connected(cluster, num_processes), placed(spec, cluster) as group:
        run = _Run(Job(uuid.uuid4().hex, spec, objects, os.getcwd(), threads), cluster, group)
        for num_left in range(cluster.restarts, -1, -1):
            try:
                return run.train(quiet=quiet, screen=screen, **settings)
            except LostLearner as error:
                console.show_cursor()
                if num_left and not quiet:
                    text = f"a learner has died ({error}): all are started again from the last checkpoint"
                    console.print(f"{text} (at most {num_left} times)", soft_wrap=True)
    raise ClusterError(
        f"learners have died {cluster.restarts + 1} times (cluster.restarts): mostly memory runs out. {LOGS}; --resume "
        "continues from the last checkpoint"
    )


@contextmanager
def connected(spec: ClusterSpec, num_processes: int) -> Iterator[None]:
    """In the block there is a connection: one that the caller had already, or one of its own."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": spec.address, "log_to_driver": False, "logging_level": "ERROR"}
    if spec.address == "local":
        settings |= {"num_cpus": num_processes, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cluster.address is {spec.address}, and no Ray cluster answers there: {error}. One is started by "
            "`ray start --head` on its first machine and `ray start --address=…` on the others; local needs none"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def placed(spec: RunSpec, cluster: ClusterSpec) -> Iterator[PlacementGroup]:
    """A place for every process: learners first, rank 0 on this node, where the run folder is."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    wants_gpus = spec.runtime.device.startswith("cuda") or (spec.runtime.device == "auto" and has_gpus)
    bundles = [{"CPU": 1.0, "GPU": float(wants_gpus)} for _ in range(cluster.learners + cluster.samplers)]
    bundles[0][f"node:{address()}"] = 0.001
    group = placement_group([*bundles, *({"CPU": 1.0} for _ in range(cluster.reward_workers))], strategy="PACK")
    try:
        if not group.wait(cluster.patience):
            free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
            raise ConfigError(
                f"the cluster has no room for cluster.learners={cluster.learners}, samplers={cluster.samplers} and "
                f"reward_workers={cluster.reward_workers}: each takes a CPU{' and a GPU' * wants_gpus}, and after "
                f"{cluster.patience:g} s (cluster.patience) {free} are free. Ask for fewer, or add machines"
            )
        yield group
    finally:
        remove_placement_group(group)


class _Run:
    """The processes of a run. Samplers and reward workers stay for all of it, learners for one start."""

    def __init__(self, job: Job, spec: ClusterSpec, group: PlacementGroup) -> None:
        self.job, self.spec, self.group = job, spec, group
        first, count = spec.learners, spec.learners + spec.samplers
        self.samplers = [self._actor(Sampler, index, max_restarts=-1) for index in range(first, count)]
        last = count + spec.reward_workers
        self.workers = [self._actor(RewardWorker, index, max_restarts=-1) for index in range(count, last)]
        # They load their models while the learners look at the data; what is wrong is said where it is asked for.
        self._loading = [actor.describe.remote() for actor in (*self.samplers, *self.workers)]

    def _actor(self, kind: type, index: int, *arguments: Any, **options: Any) -> Any:
        where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        options |= {"num_cpus": 1, "num_gpus": self.group.bundle_specs[index].get("GPU", 0)}
        # Requests are asked again by those who ask (`Pool`), whom it may be for another actor.
        actor = ray.remote(kind).options(scheduling_strategy=where, max_task_retries=0, **options)
        return actor.remote(self.job, *arguments)

    def train(self, **settings: Any) -> TrainResult:
        """Starts the learners and waits for their end. Raises LostLearner where one has died, else what they raise."""
        learners = [self._actor(Learner, rank, rank, max_concurrency=4) for rank in range(self.spec.learners)]
        try:
            places, free = zip(*ray.get([each.place.remote() for each in learners], timeout=self.spec.patience))
            crew = Crew(self.samplers, self.workers, learners, places, free[0])
            return self._result(learners[0], [each.train.remote(crew, **settings) for each in learners])
        except GetTimeoutError as error:
            raise ClusterError(f"no learner had started after {self.spec.patience:g} s (cluster.patience)") from error
        except RayTaskError as error:
            raise own_error(error) from None
        except RayError as error:
            raise LostLearner(type(error).__name__) from error
        finally:
            for learner in learners:
                ray.kill(learner)

    def _result(self, main: Any, ends: list[Any]) -> TrainResult:
        """Waits for all ranks, showing what the first one prints and passing signals on."""
        asked, errors, waiting, until = list[str](), list[RayError](), ends, float("inf")
        with signals_handled(asked.append):
            while waiting and time.monotonic() < until:
                _show(main)
                if asked:
                    main.stop.remote(asked.pop())
                done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
                errors += [error for end in done if (error := _error_of(end)) is not None]
                # What ranks share (dar.collective) comes from each of them; of other errors the rest know nothing.
                if errors and getattr(getattr(errors[0], "cause", None), "is_elsewhere", None) is None:
                    until = min(until, time.monotonic() + _GRACE)
        _show(main)
        if errors:
            raise min(errors, key=_distance)
        return ray.get(ends[0])


def _show(learner: Any) -> None:
    with suppress(RayError):  # it has died, which its end says
        for name, text in ray.get(learner.output.remote()):
            stream = getattr(sys, name)
            stream.write(text)
            stream.flush()


def _error_of(end: Any) -> RayError | None:
    try:
        ray.get(end)
    except RayError as error:
        return error
    return None


def _distance(error: RayError) -> int:
    """From the cause: a death, what a rank has met, what others say for it, that one was lost."""
    if not isinstance(error, RayTaskError):
        return 0
    cause = error.cause
    return 3 if isinstance(cause, RankError) else 2 if isinstance(cause, DarError) and cause.is_elsewhere else 1
