"""The driver of a run on a cluster: places its processes, shows what the first rank prints, starts dead ones again."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dar.assembly.objects import NOTHING, Objects
from dar.assembly.training import TrainResult
from dar.cluster.job import Job, address
from dar.cluster.learner import Learner, Start
from dar.cluster.pool import own_error
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
    objects: Objects = NOTHING,
    *,
    resume: bool,
    allow_changed_recipe: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    console: Console | None = None,
    command: str,
) -> TrainResult:
    """Runs a recipe on the cluster that it names.

    Args:
        spec: the recipe, with a `cluster`.
        objects: to build it of; they are pickled.
        resume, allow_changed_recipe, overwrite, quiet, console: as of `build_loop`.
        command: as of `run_loop`.

    Raises:
        ConfigError: there is no such cluster, or too little of it.
        ClusterError: more actors have died than may.
        DarError: as `build_loop` and `run_loop`.
    """
    cluster, console = spec.cluster, console or Console()
    assert cluster is not None
    local = {"model": objects.model, "ref_model": objects.reference, "callbacks": objects.callbacks or None}
    if names := [name for name, value in local.items() if value is not None]:
        raise ConfigError(
            f"{' and '.join(names)} live in this process, and a run on a cluster goes on in others: give models by "
            "their path, and leave callbacks out"
        )
    screen = {"width": console.width, "force_terminal": console.is_terminal, "color_system": console.color_system,
              "stderr": console.stderr}  # fmt: skip
    num_processes = cluster.learners + cluster.samplers + cluster.reward_workers
    with connected(cluster, num_processes):
        job = Job(uuid.uuid4().hex, spec, objects, os.getcwd(), _threads(cluster, num_processes))
        with placed(spec) as group:
            crew = Crew(job, group)
            start = {"resume": resume, "overwrite": overwrite, "allow_changed_recipe": allow_changed_recipe,
                     "quiet": quiet, "command": command, "screen": screen}  # fmt: skip
            for num_left in range(cluster.restarts, -1, -1):
                try:
                    return crew.train(**start)
                except LostLearner as error:
                    console.show_cursor()
                    text = f"a learner has died ({error}): all are started again from the last checkpoint"
                    if not num_left:
                        break
                    if not quiet:
                        console.print(f"{text} (at most {num_left} times)", soft_wrap=True)
    raise ClusterError(
        f"learners have died {cluster.restarts + 1} times (cluster.restarts): mostly memory runs out. Ray's logs on "
        "their machines (by default in /tmp/ray/session_latest/logs) say more; --resume continues from the last "
        "checkpoint"
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
def placed(spec: RunSpec) -> Iterator[PlacementGroup]:
    """A place for every process: learners first, rank 0 on this node, where the run folder is."""
    cluster = spec.cluster
    assert cluster is not None
    wants_gpu = spec.runtime.device.startswith("cuda")
    wants_gpu |= spec.runtime.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    computing = {"CPU": 1.0, "GPU": 1.0} if wants_gpu else {"CPU": 1.0}
    bundles = [dict(computing) for _ in range(cluster.learners + cluster.samplers)]
    bundles[0][f"node:{address()}"] = 0.001
    group = placement_group([*bundles, *({"CPU": 1.0} for _ in range(cluster.reward_workers))], strategy="PACK")
    try:
        if not group.wait(cluster.patience):
            asked = f"{len(group.bundle_specs)} CPUs" + (f" and {len(bundles)} GPUs" if wants_gpu else "")
            free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
            raise ConfigError(
                f"the cluster has no room for cluster.learners={cluster.learners}, samplers={cluster.samplers} and "
                f"reward_workers={cluster.reward_workers}: they take {asked}, one each, and after "
                f"{cluster.patience:g} s (cluster.patience) {free} are free. Ask for fewer, or add machines"
            )
        yield group
    finally:
        remove_placement_group(group)


class Crew:
    """The processes of a run. Samplers and reward workers stay for all of it, learners for one start."""

    def __init__(self, job: Job, group: PlacementGroup) -> None:
        self.job, self.group = job, group
        cluster = job.spec.cluster
        assert cluster is not None
        self.spec = cluster
        bounds = (cluster.learners, cluster.learners + cluster.samplers)
        self.samplers = [self._actor(Sampler, index, max_restarts=-1) for index in range(*bounds)]
        self.reward_workers = [
            self._actor(RewardWorker, index, max_restarts=-1) for index in range(bounds[1], len(group.bundle_specs))
        ]
        # They load their models while the learners look at the data; what is wrong is said where it is asked for.
        self._loading = [actor.describe.remote() for actor in (*self.samplers, *self.reward_workers)]

    def _actor(self, kind: type, index: int, *arguments: Any, **options: Any) -> Any:
        bundle = self.group.bundle_specs[index]
        where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        # Requests are asked again by those who ask (`Pool`), whom it may be for another actor.
        options |= {
            "num_cpus": 1,
            "num_gpus": bundle.get("GPU", 0),
            "max_task_retries": 0,
            "scheduling_strategy": where,
        }
        return ray.remote(kind).options(**options).remote(self.job, *arguments)

    def train(self, **settings: Any) -> TrainResult:
        """Starts the learners and waits for their end.

        Raises:
            LostLearner: one has died.
            DarError: what they raise.
        """
        learners = [self._actor(Learner, rank, rank, max_restarts=0, max_concurrency=4)
                    for rank in range(self.spec.learners)]  # fmt: skip
        try:
            places = ray.get([learner.place.remote() for learner in learners], timeout=self.spec.patience)
            start = Start(self.samplers, self.reward_workers, [where for where, _ in places], learners[0], places[0][1],
                          **settings)  # fmt: skip
            return self._result(learners, [learner.train.remote(start) for learner in learners])
        except RayTaskError as error:
            raise own_error(error) from None
        except RayError as error:
            raise LostLearner(type(error).__name__) from error
        finally:
            for learner in learners:
                ray.kill(learner)

    def _result(self, learners: Sequence[Any], ends: list[Any]) -> TrainResult:
        """Waits for all ranks, showing what the first one prints and passing signals on."""
        asked: list[str] = []
        errors: list[RayError] = []
        until, is_told, waiting = float("inf"), False, ends
        with signals_handled(asked.append):
            while waiting and time.monotonic() < until:
                self._show(learners[0])
                if asked and not is_told:
                    learners[0].stop.remote(asked[0])
                    is_told = True
                done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
                errors += [error for end in done if (error := _error_of(end)) is not None]
                # What ranks share (dar.collective) comes from each of them; of other errors the rest know nothing.
                if errors and until == float("inf") and not _is_shared(errors[0]):
                    until = time.monotonic() + _GRACE
        self._show(learners[0])
        if errors:
            raise min(errors, key=_rank_of_error)
        return ray.get(ends[0])

    def _show(self, learner: Any) -> None:
        with suppress(RayError):  # it has died, which its end says
            for is_error, text in ray.get(learner.output.remote()):
                stream = sys.stderr if is_error else sys.stdout
                stream.write(text)
                stream.flush()


def _error_of(end: Any) -> RayError | None:
    try:
        ray.get(end)
    except RayError as error:
        return error
    return None


def _is_shared(error: RayError) -> bool:
    return isinstance(error, RayTaskError) and getattr(error.cause, "is_elsewhere", None) is not None


def _rank_of_error(error: RayError) -> int:
    """The lower, the nearer to the cause: a death, what a rank has met, what others say for it, that one was lost."""
    if not isinstance(error, RayTaskError):
        return 0
    cause = error.cause
    return 3 if isinstance(cause, RankError) else 2 if isinstance(cause, DarError) and cause.is_elsewhere else 1


def _threads(spec: ClusterSpec, num_processes: int) -> int:
    """For each process: as OMP_NUM_THREADS says, else its share of this machine's, or one on unknown ones."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() // num_processes) if spec.address == "local" else 1
