"""The engine of a learner on a cluster: the samplers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, Literal

import ray

from dar.batch import Prompt, Rollouts, joined
from dar.cluster.pool import Pool
from dar.cluster.sampler import Weights
from dar.collective import gathered, num_ranks, own_rank
from dar.errors import RolloutError
from dar.policies.base import ModelPolicy
from dar.rewards.background import start_in_background
from dar.rollout.portions import portions
from dar.rollout.protocol import Progress


class RemoteEngine:
    """A `BackgroundEngine` that puts weights into the object store, and asks samplers for completions with them.

    A request has all that its answer depends on (weights, prompts, key), so whoever answers gives the same.

    Args:
        pools: the samplers', and others whose repeated requests are told of in metrics.
        main: handle of the first rank's learner, which the other ranks ask for the weights.
        prompts_per_request: None shares a step's prompts out equally.
    """

    weights: Weights | None = None

    def __init__(self, pools: Sequence[Pool], main: Any, prompts_per_request: int | None) -> None:
        self.samplers, self.pools, self.main = pools[0], pools, main
        self.prompts_per_request = prompts_per_request
        self._seconds = 0.0

    @cached_property
    def described(self) -> list[tuple[str, Any]]:
        """What the samplers say of themselves, once all have loaded their model. Raises as `Pool.ask`."""

        async def ask() -> list[tuple[str, Any]]:
            return [await self.samplers.ask("describe") for _ in self.samplers.actors]

        return start_in_background(ask()).result()

    @property
    def reproduces(self) -> Literal["tokens", "requests", "nothing"]:
        return self.described[0][1]

    def sync(self, policy: ModelPolicy[Any], version: int) -> None:
        if self.weights is not None and self.weights.version == version:
            return
        started, trained = time.perf_counter(), policy.trainable()
        with policy.strategy.whole(policy.module, on="main") as module:
            if own_rank() == 0:
                # Numpy's arrays are read where they lie in the store; tensors would be copied out of it.
                whole = {name: value.detach().cpu().numpy() for name, value in module.model.named_parameters()
                         if name in trained}  # fmt: skip
                values = ray.put(whole)
                self.weights = Weights(version, values.hex(), values)
        if num_ranks() > 1:
            gathered(None)  # the main rank has put them
            self.weights = self.weights if own_rank() == 0 else ray.get(self.main.weights.remote())
        self._seconds += time.perf_counter() - started

    def generate(self, prompts: Sequence[Prompt], num_generations: int, **settings: Any) -> Rollouts:
        return self.submit(prompts, num_generations, **settings).result()

    def submit(
        self, prompts: Sequence[Prompt], num_generations: int, *, progress: Progress | None = None, **settings: Any
    ) -> Future[Rollouts]:
        weights = self.weights
        assert weights is not None
        # Of several ranks that ask at once, each has the samplers to itself that are its share.
        parts = portions(prompts, self.prompts_per_request, shares=-(-len(self.samplers.actors) // num_ranks()))

        async def ask(part: Sequence[Prompt]) -> Rollouts:
            found = await self.samplers.ask("generate", weights, part, num_generations, **settings)
            if set(found.versions) != {weights.version}:
                raise RolloutError(f"asked for samples of version {weights.version}, got those of {found.versions}")
            if progress is not None:
                progress(int(found.groups.lengths.sum()))
            return found

        async def ask_all() -> Rollouts:
            return joined(await asyncio.gather(*map(ask, parts)))

        return start_in_background(ask_all())

    def metrics(self) -> dict[str, float]:
        """Since the last call: seconds in which weights were put into the store, and requests whose actor died."""
        found = {"weights_seconds": self._seconds, "asked_again": sum(pool.num_again for pool in self.pools)}
        self._seconds = 0.0
        for pool in self.pools:
            pool.num_again = 0
        return found

    def close(self) -> None:
        """The samplers are the driver's to end."""
