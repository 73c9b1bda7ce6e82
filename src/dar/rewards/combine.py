"""Several rewards with weights, scored together: each one's values are kept, their weighted sum is trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dar.batch import Rollouts
from dar.errors import RewardError
from dar.rewards.function import Call, RewardFunction, Score, naming_errors
from dar.rewards.table import FAILED_FRACTION, RewardTable, Shaping, tally
from dar.sandbox.score import Failed


@dataclass(frozen=True)
class Reward:
    """A reward function with its name in metrics, its factor in the sum, and what happens where it fails.

    on_failure: a completion whose score is `Failed` stops the run (`raise`) or leaves its group (`drop`).
    max_failed_share: of a batch's completions; a larger share of failures stops the run all the same.
    clip, threshold, standardize: as in `Shaping`.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    on_failure: Literal["raise", "drop"] = "raise"
    max_failed_share: float = 0.1
    clip: tuple[float, float] | None = None
    threshold: float | None = None
    standardize: bool = False

    @property
    def shaping(self) -> Shaping:
        """How its values become its part of the sum."""
        return Shaping(self.weight, self.clip, self.threshold, self.standardize)


@runtime_checkable
class Reporting(Protocol):
    """A reward function that has more to say than its scores: requests, latencies, cache hits."""

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call, logged as `rewards/<name>/<key>`."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A reward function whose numbers belong into a checkpoint."""

    def state(self) -> dict[str, float]: ...

    def restore(self, state: Mapping[str, float]) -> None: ...


class RewardSet:
    """The rewards of a run."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ValueError("a RewardSet needs at least one reward")
        self.rewards = tuple(rewards)

    def start(self, rollouts: Rollouts, *, where: str) -> Scoring:
        """Calls every reward function: plain ones are done when this returns, asynchronous ones go on meanwhile.

        Args:
            rollouts: what was sampled.
            where: for messages, such as `step 7`.

        Raises:
            RewardError: a function failed.
        """
        arguments = completion_arguments(rollouts)
        calls: list[Call] = []
        # Asynchronous ones first, so that they wait while the others work.
        order = sorted(self.rewards, key=lambda reward: not _is_async(reward))
        try:
            for reward in order:
                calls.append(Call(reward.name, reward.function, arguments, where=where))
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        by_name = {call.name: call for call in calls}
        return Scoring(self.rewards, [by_name[reward.name] for reward in self.rewards], rollouts, where)

    def score(self, rollouts: Rollouts, *, where: str) -> RewardTable:
        """Scores every completion with every reward, and waits for all of them.

        Raises:
            RewardError: a function failed, or no reward applies to some completion.
        """
        return self.start(rollouts, where=where).finish()

    def state(self) -> dict[str, float]:
        """The numbers of stateful rewards, for a checkpoint, as `<name>.<key>`."""
        return {
            f"{reward.name}.{key}": value
            for reward in self.rewards
            if isinstance(reward.function, Stateful)
            for key, value in reward.function.state().items()
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes back what `state` gave."""
        for reward in self.rewards:
            if isinstance(reward.function, Stateful):
                prefix = f"{reward.name}."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                reward.function.restore(own)


def _is_async(reward: Reward) -> bool:
    """Of what runs when the function is called: itself, or an object's `__call__`."""
    function = reward.function
    with naming_errors(f"reward '{reward.name}'", " before it was called"):
        return inspect.iscoroutinefunction(function if inspect.isroutine(function) else function.__call__)


@dataclass(frozen=True)
class Scoring:
    """Rewards on their way."""

    rewards: tuple[Reward, ...]
    calls: Sequence[Call]
    rollouts: Rollouts
    where: str

    def finish(self) -> RewardTable:
        """Waits for what still runs, and adds up.

        Raises:
            RewardError: a function failed, more scores failed than may, or no reward applies to some completion.
        """
        try:
            scores = [call.result() for call in self.calls]
        except BaseException:
            self.cancel()
            raise
        shape = (len(self.rollouts.prompts), self.rollouts.num_generations)
        num_rows = shape[0] * shape[1]
        parts: dict[str, Tensor] = {}
        reported: dict[str, float] = {}
        applied, failed = torch.zeros(num_rows, dtype=torch.bool), torch.zeros(num_rows, dtype=torch.bool)
        for reward, values in zip(self.rewards, scores, strict=True):
            lost = torch.tensor([isinstance(value, Failed) for value in values])
            if lost.any():
                self._require_few(reward, values)
            column = torch.tensor([value if isinstance(value, float) else math.nan for value in values]).double()
            applied |= ~column.isnan() | lost
            failed |= lost
            parts[reward.name] = column.float().reshape(shape)
            if reward.on_failure == "drop":
                reported[f"rewards/{reward.name}{FAILED_FRACTION}"] = float(lost.float().mean())
            with naming_errors(f"reward '{reward.name}'", f" in metrics() at {self.where}"):
                if isinstance(reward.function, Reporting):
                    said = reward.function.metrics()
                    reported |= {f"rewards/{reward.name}/{key}": value for key, value in said.items()}
        if not applied.all():
            row = int((~applied).nonzero()[0])
            raise RewardError(
                f"no reward applies to row {row} at {self.where}: all returned None. Its completion was: "
                f"{self.rollouts.texts[row][:300]}"
            )
        shaping = {reward.name: reward.shaping for reward in self.rewards}
        return tally(parts, failed.reshape(shape), shaping, reported)

    def cancel(self) -> None:
        """Gives up what still runs."""
        for call in self.calls:
            call.cancel()

    def _require_few(self, reward: Reward, values: Sequence[Score]) -> None:
        failures = [(row, value.reason) for row, value in enumerate(values) if isinstance(value, Failed)]
        row, reason = failures[0]
        share = len(failures) / len(values)
        first = f"The first, row {row}: {reason}. Its completion was: {self.rollouts.texts[row][:300]}"
        if reward.on_failure == "raise":
            raise RewardError(
                f"reward '{reward.name}' failed for {len(failures)} of {len(values)} completions at {self.where} "
                f"(on_failure: drop would leave them out). {first}"
            )
        if share > reward.max_failed_share:
            raise RewardError(
                f"reward '{reward.name}' failed for {len(failures)} of {len(values)} completions at {self.where}, more "
                f"than max_failed_share {reward.max_failed_share:g} allows. {first}"
            )


def completion_arguments(rollouts: Rollouts) -> dict[str, Any]:
    """TRL's keyword arguments: conversational prompts get conversational completions, strings get strings."""
    per_row = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    completions = [
        text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(per_row, rollouts.texts, strict=True)
    ]
    lengths = rollouts.groups.lengths.tolist()
    ids = [row[:length] for row, length in zip(rollouts.groups.completion_ids.tolist(), lengths, strict=True)]
    names = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in per_row] for name in names}
    return {
        **columns,
        "prompts": [prompt.content for prompt in per_row],
        "completions": completions,
        "completion_ids": ids,
        "finish_reasons": list(rollouts.finish_reasons),
        "group_ids": [index for index in range(len(rollouts.prompts)) for _ in range(rollouts.num_generations)],
    }
