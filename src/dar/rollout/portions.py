"""Sampling a step's prompts a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dar.batch import Prompt, Rollouts, joined
from dar.rollout.protocol import BackgroundEngine, Engine


def portions(prompts: Sequence[Prompt], size: int | None, *, shares: int) -> list[Sequence[Prompt]]:
    """Prompts in their order, `size` at a time, or where that is None in equal shares."""
    count = min(shares, len(prompts))
    bounds = [index * len(prompts) // count for index in range(count + 1)]
    if size is not None:
        bounds = [*range(0, len(prompts), size), len(prompts)]
    return [prompts[start:stop] for start, stop in pairwise(bounds)]


class PortionedEngine:
    """Another engine, asked for `size` prompts at a time: what is sampled together is rounded together."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size
        self.reproduces: Any = engine.reproduces
        self.sync, self.close = engine.sync, engine.close

    def generate(self, prompts: Sequence[Prompt], num_generations: int, **settings: Any) -> Rollouts:
        parts = portions(prompts, self.size, shares=1)
        return joined([self.engine.generate(part, num_generations, **settings) for part in parts])


def in_portions(engine: Engine, size: int | None) -> Engine:
    """An engine asked for so many prompts at a time, if a number is given. One with a server decides itself."""
    return engine if size is None or isinstance(engine, BackgroundEngine) else PortionedEngine(engine, size)
