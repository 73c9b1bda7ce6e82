"""Rewards on a cluster: what computes is asked of the reward workers, what keeps an account stays with the learner."""

from __future__ import annotations

import asyncio
import inspect
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

from dar.assembly.reward import build_reward, check_reward
from dar.cluster.job import Job, place
from dar.cluster.pool import Pool
from dar.config.model_reward import ModelRewardSpec
from dar.config.rewards import AnyReward, FunctionRewardSpec, reward_name
from dar.reward_model.reward import Calibrated
from dar.rewards import Reward, RewardFunction
from dar.rewards.combine import Reporting, Stateful
from dar.rewards.function import Call, Logged, RewardValue

Kind = Literal["rewards", "gold"]
Answer = tuple[list[RewardValue], dict[str, float], Logged]
"""Values, and what the function reports and logs beside them."""


class RewardWorker:
    """The actor that scores. Values and reports come in one answer, so one that dies has told nothing twice."""

    def __init__(self, job: Job) -> None:
        job.settle()
        self.job, self._reward = job, cache(partial(build, job))

    def describe(self) -> str:
        """Where it is, once its reward models are loaded. Raises as `build_reward`."""
        for kind in ("rewards", "gold"):
            for index, spec in enumerate(specs_of(self.job, kind)):
                if isinstance(spec, ModelRewardSpec):
                    self._reward(kind, index)
        return place()

    def score(self, kind: Kind, index: int, arguments: Mapping[str, Any]) -> Answer:
        """What a reward of the recipe says of some completions. Raises as `dar.rewards.function.Call`."""
        reward = self._reward(kind, index)
        call = Call(reward.name, reward.function, arguments, state=arguments.get("trainer_state"))
        values = call.result()
        return values, reward.function.metrics() if isinstance(reward.function, Reporting) else {}, call.logged


class RemoteReward:
    """A reward that the workers compute: the recipe's of that kind and index, its prompts in `num_shares` parts.

    A `function` of the user's own says what it is to be called with.
    """

    def __init__(
        self, workers: Pool, kind: Kind, index: int, num_shares: int, function: RewardFunction | None = None
    ) -> None:
        self.workers, self.kind, self.index, self.num_shares = workers, kind, index, num_shares
        self._said: dict[str, float] = {}
        if function is not None:
            self.__signature__ = inspect.signature(function)

    async def __call__(self, **arguments: Any) -> list[RewardValue]:
        log = [arguments.pop(name, None) for name in ("log_extra", "log_metric")]  # those of this process
        shares = [arguments] if self.num_shares == 1 else shared_out(arguments, self.num_shares)
        asked = (self.workers.ask("score", self.kind, self.index, share) for share in shares)
        answers: list[Answer] = await asyncio.gather(*asked)
        self._said = answers[-1][1]  # one that has something to report is never shared out
        for column, values in answers[-1][2].columns.items():
            log[0](column, values)
        for name, values in answers[-1][2].metrics.items():
            for value in values:
                log[1](name, value)
        return [value for values, _, _ in answers for value in values]

    def metrics(self) -> dict[str, float]:
        said, self._said = self._said, {}
        return said


class RemoteModelReward(RemoteReward, Calibrated):
    """A reward model's raw scores from the workers, shifted and scaled here, where checkpoints are written."""

    async def __call__(self, **arguments: Any) -> list[RewardValue]:
        return [self.calibrated(score) for score in await super().__call__(**arguments) if isinstance(score, float)]


def shared_out(arguments: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """A reward's arguments in at most `count` parts; the completions of a prompt stay together."""
    groups = arguments["group_ids"]
    first, num_groups = groups[0], groups[-1] - groups[0] + 1
    count = min(count, num_groups)
    bounds = [bisect_left(groups, first + index * num_groups // count) for index in range(count)] + [len(groups)]
    return [{name: values[start:stop] for name, values in arguments.items()} for start, stop in pairwise(bounds)]


def remote_rewards(job: Job, kind: Kind, workers: Pool, single: Sequence[Pool]) -> dict[str, Any]:
    """The rewards of a recipe by name, as a learner calls them, from all workers or from each one alone.

    A function of the user's own gets a whole batch, always by the same worker, as it may compare all of it or remember
    something. The library's own rewards look at a prompt at a time and are shared out. One whose numbers belong into a
    checkpoint (a judge, which spends a budget and only waits for its server) stays in this process.

    Raises:
        ConfigError: as `build_reward`.
    """
    found: dict[str, Any] = {}
    for index, spec in enumerate(specs_of(job, kind)):
        name = reward_name(spec)
        if isinstance(spec, ModelRewardSpec):
            check_reward(spec, job.spec.runtime)
            found[name] = RemoteModelReward(workers, kind, index, len(single))
        elif isinstance(function := build(job, kind, index).function, Stateful):
            found[name] = function
        elif isinstance(spec, FunctionRewardSpec):
            found[name] = RemoteReward(single[index % len(single)], kind, index, 1, function)
        else:
            found[name] = RemoteReward(workers, kind, index, len(single))
    return found


def specs_of(job: Job, kind: Kind) -> Sequence[AnyReward]:
    """The recipe's rewards of a kind."""
    return job.spec.rewards if kind == "rewards" else job.spec.evaluation.rewards


def build(job: Job, kind: Kind, index: int) -> Reward:
    """One of them, to be computed in this process. Raises as `build_reward`."""
    given = job.objects.rewards if kind == "rewards" else {}
    return build_reward(specs_of(job, kind)[index], given, job.spec.runtime)
