"""Engines with weights."""

from __future__ import annotations

import copy
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

from dar.batch import Rollouts
from dar.errors import RolloutError
from dar.policies.text.policy import Policy
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey


def engine_of(policy: Policy, *, max_tokens: int) -> InProcessEngine:
    """Samples with the policy's weights."""
    engine = InProcessEngine(max_tokens=max_tokens)
    engine.sync(policy, 0)
    return engine


class ThreadedEngine:
    """Samples in a thread of its own, with a copy of the weights that it was given last when it was asked.

    Args:
        delay: seconds, up to which each batch waits before it begins; another time in every run.
        fails_at: the step whose batch ends in an error.
        asked: told (purpose and step of the key, version) of every batch, in the order they were asked for.
    """

    reproduces = "tokens"
    asked: ClassVar[list[tuple[str, int, int]]] = []

    def __init__(self, *, delay: float = 0.0, fails_at: int = 0) -> None:
        self.delay, self.fails_at = delay, fails_at
        self.thread = ThreadPoolExecutor(1)

    def sync(self, policy: Policy, version: int) -> None:
        self.policy, self.version = copy.deepcopy(policy), version

    def generate(self, *arguments: Any, **others: Any) -> Rollouts:
        return self.submit(*arguments, **others).result()

    def submit(self, *arguments: Any, key: SamplingKey, **others: Any) -> Future[Rollouts]:
        policy, version = self.policy, self.version
        self.asked.append((key.purpose, key.step, version))

        def sample() -> Rollouts:
            time.sleep(random.SystemRandom().uniform(0, self.delay))
            if key.purpose == "train" and key.step == self.fails_at:
                raise RolloutError("the sampler ran out of memory")
            engine = InProcessEngine(max_tokens=16384)
            engine.sync(policy, version)
            return engine.generate(*arguments, key=key, **others)

        return self.thread.submit(sample)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
