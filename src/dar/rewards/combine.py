"""Several rewards with weights, scored together: each one's values are kept, their weighted sum is trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dar.batch import Message, Rollouts
from dar.config.reward import RewardSpec
from dar.errors import RewardError
from dar.rewards.function import Call, RewardFunction, RewardValue, naming_errors
from dar.rewards.table import FAILED_FRACTION, RewardTable, tally
from dar.sandbox.score import Failed


@dataclass(frozen=True)
class Reward:
    """A reward function with its name in metrics; its spec says what it adds to the sum, and what happens where it
    fails."""

    name: str
    function: RewardFunction
    spec: RewardSpec = field(default_factory=RewardSpec)


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

    def start(self, rollouts: Rollouts, *, where: str, state: Any = None) -> Scoring:
        """Calls every reward function: plain ones are done when this returns, asynchronous ones go on meanwhile.

        Args:
            rollouts: what was sampled.
            where: for messages, such as `step 7`.
            state: a `transformers.TrainerState` for functions that name `trainer_state`.

        Raises:
            RewardError: a function failed.
        """
        arguments = completion_arguments(rollouts)
        calls: list[Call] = []
        # Asynchronous ones first, so that they wait while the others work.
        order = sorted(self.rewards, key=lambda reward: not _is_async(reward))
        try:
            for reward in order:
                calls.append(Call(reward.name, reward.function, arguments, where=where, state=state))
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        by_name = {call.name: call for call in calls}
        return Scoring(self.rewards, [by_name[reward.name] for reward in self.rewards], rollouts, where)

    def score(self, rollouts: Rollouts, *, where: str, state: Any = None) -> RewardTable:
        """Scores every completion with every reward, and waits for all of them.

        Raises:
            RewardError: a function failed, or no reward applies to some completion.
        """
        return self.start(rollouts, where=where, state=state).finish()

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

    def finish(self, *, part_of: int | None = None) -> RewardTable:
        """Waits for what still runs, and adds up.

        Args:
            part_of: given where these are a part of a batch of so many completions: of so many `max_failed_share` may
                fail, and what the functions report is left for `reports`, to be told once.

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
                self._require_few(reward, values, part_of or num_rows)
            column = torch.tensor([value if isinstance(value, float) else math.nan for value in values]).double()
            applied |= ~column.isnan() | lost
            failed |= lost
            parts[reward.name] = column.float().reshape(shape)
            if reward.spec.on_failure == "drop":
                reported[f"rewards/{reward.name}{FAILED_FRACTION}"] = float(lost.float().mean())
        if part_of is None:
            reported |= reports(self.rewards, self.where)
        if not applied.all():
            row = int((~applied).nonzero()[0])
            raise RewardError(
                f"no reward applies to row {row} at {self.where}: all returned None. Its completion was: "
                f"{self.rollouts.texts[row][:300]}"
            )
        specs = {reward.name: reward.spec for reward in self.rewards}
        logged = {
            f"rewards/{call.name}/{key}": each for call in self.calls for key, each in call.logged.metrics.items()
        }
        extra = {f"{call.name}/{key}": each for call in self.calls for key, each in call.logged.columns.items()}
        return replace(tally(parts, failed.reshape(shape), specs, reported), logged=logged, extra=extra)

    def cancel(self) -> None:
        """Gives up what still runs."""
        for call in self.calls:
            call.cancel()

    def _require_few(self, reward: Reward, values: Sequence[RewardValue], num_rows: int) -> None:
        failures = [(row, value.reason) for row, value in enumerate(values) if isinstance(value, Failed)]
        row, reason = failures[0]
        advice, most = " (on_failure: drop would leave them out)", reward.spec.max_failed_share
        if reward.spec.on_failure == "drop":
            if len(failures) / num_rows <= most:
                return
            advice = f", more than max_failed_share {most:g} allows"
        raise RewardError(
            f"reward '{reward.name}' failed for {len(failures)} of {len(values)} completions at {self.where}{advice}. "
            f"The first, row {row}: {reason}. Its completion was: {self.rollouts.texts[row][:300]}"
        )


def reports(rewards: Sequence[Reward], where: str) -> dict[str, float]:
    """What reward functions have to say beside their scores since they last said it, by metric name.

    Raises RewardError where one cannot.
    """
    found: dict[str, float] = {}
    for reward in rewards:
        with naming_errors(f"reward '{reward.name}'", f" in metrics() at {where}"):
            if isinstance(reward.function, Reporting):
                said = reward.function.metrics()
                found |= {f"rewards/{reward.name}/{key}": value for key, value in said.items()}
    return found


def keyword_arguments(
    prompts: Sequence[str | list[Message]],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """TRL's keyword arguments: conversational prompts get conversational completions, strings get strings.

    Args:
        prompts, rows, texts: of each completion its prompt, the other columns of its row, and itself.
        others: what else there is to know of each.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    return {**columns, "prompts": prompts, "completions": completions, **others}


def completion_arguments(rollouts: Rollouts) -> dict[str, Any]:
    """What a reward may name of a batch."""
    per_row = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    lengths = rollouts.groups.lengths.tolist()
    return keyword_arguments(
        [prompt.content for prompt in per_row],
        [prompt.columns for prompt in per_row],
        rollouts.texts,
        completion_ids=[
            row[:length] for row, length in zip(rollouts.groups.completion_ids.tolist(), lengths, strict=True)
        ],
        finish_reasons=list(rollouts.finish_reasons),
        group_ids=[index for index in range(len(rollouts.prompts)) for _ in range(rollouts.num_generations)],
        **({} if rollouts.images is None else {"images": rollouts.images}),
    )
