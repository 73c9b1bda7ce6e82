"""The actor that samples."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
import torch

from dar.assembly.device import build_precision
from dar.assembly.loop import build_parts
from dar.batch import Prompt, Rollouts
from dar.cluster.job import Job, place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A policy's trained weights in the object store, under a `name` that no other has, of the same step neither.

    `values` refers to arrays by name; from inside of this, Ray fetches them only where they are read.
    """

    version: int
    name: str
    values: ray.ObjectRef


class Sampler:
    """Samples with whatever weights come with a request, and holds nothing that would be lost with it."""

    def __init__(self, job: Job) -> None:
        job.settle()
        self.job, self._held = job, ""

    def describe(self) -> tuple[str, str]:
        """Where it is, and what its engine reproduces, once the model is loaded. Raises as `build_loop`."""
        return place(), self._built[1].reproduces

    def generate(self, weights: Weights, prompts: Sequence[Prompt], num_generations: int, **settings: Any) -> Rollouts:
        """As `dar.rollout.protocol.Engine.generate`, with these weights."""
        policy, engine, _ = self._built
        if weights.name != self._held:
            self._held = ""  # half of them may be in place where this fails
            self._take(ray.get(weights.values))
            engine.sync(policy, weights.version)
            self._held = weights.name
        return engine.generate(prompts, num_generations, **settings)

    @cached_property
    def _built(self) -> tuple[Any, Any, Any]:
        """Policy, engine, and the ranks of adapters that shrink."""
        parts = build_parts(self.job.spec, self.job.objects)
        policy = parts.build(build_precision(self.job.spec), with_reference=False)
        return policy, parts.engine(log.info), parts.ranks()

    @torch.no_grad()
    def _take(self, values: Mapping[str, Any]) -> None:
        """The weights' numbers, in place; an adapter is cut to their rank first."""
        policy, _, ranks = self._built
        if ranks is not None:
            has = {name: len(values[f"base_model.model.{name}.lora_A.default.weight"]) for name in ranks.layers}
            ranks.restore({"ranks": has})
        own = dict(policy.model.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the object store's memory is only to be read
            for name, value in values.items():
                own[name].copy_(torch.from_numpy(value))
