"""Where a step's completions come from: sampled from π_t and scored, or read from the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import TrainerState

from dar.batch import Prompt, Rollouts
from dar.config.run import RunSpec
from dar.data.logged import LoggedGroup, LoggedSet, token_groups
from dar.data.prompts import PromptStream
from dar.learn.learner import Phase
from dar.policies.protocol import Policy
from dar.rewards import RewardSet, RewardTable, Scoring
from dar.rollout.protocol import BackgroundEngine, Engine, Progress
from dar.rollout.sampling import SamplingKey
from dar.run.ahead import Ahead

Answer = TypeVar("Answer")


class PendingRewards(Protocol):
    """Rewards on their way: what asks other machines goes on while this one computes."""

    def finish(self) -> RewardTable:
        """Waits for them.

        Raises:
            RewardError: scoring failed.
        """
        ...

    def cancel(self) -> None:
        """Gives them up."""
        ...


class Kept(Protocol):
    """Has numbers that belong into a checkpoint."""

    def state(self) -> dict[str, float]:
        """The numbers, by name."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes back what `state` gave. Raises CheckpointError where that cannot be."""
        ...


class Collector(Kept, Protocol):
    """Gives each step its completions with their rewards."""

    @property
    def stream(self) -> PromptStream:
        """The order of the prompts."""
        ...

    def collect(self, step: int, first: int, stop: int, *, phase: Phase) -> tuple[Rollouts, PendingRewards]:
        """Completions of this rank's prompts (first…stop−1 of the step's), and their rewards, perhaps on their way.

        Raises:
            RolloutError, RewardError: sampling or scoring failed.
        """
        ...


@dataclass(frozen=True)
class OnlineCollector:
    """Samples from the policy and asks the rewards.

    The completions of step s are of the weights after max(0, s − 1 − n) steps, n being `sampling.max_staleness`.
    Whoever is faster, sampler or learner, waits for the other, so that no result depends on who it is.
    """

    spec: RunSpec
    policy: Policy
    engine: Engine
    rewards: RewardSet
    stream: PromptStream
    progress: Progress
    ahead: Ahead

    def collect(self, step: int, first: int, stop: int, *, phase: Phase) -> tuple[Rollouts, PendingRewards]:
        engine = self.engine
        with phase("rollout"):
            engine.sync(self.policy, step - 1)
            if self.ahead.lag == 0:
                rollouts = self._answer(engine.generate, step, first, stop, self.progress)
            else:
                assert isinstance(engine, BackgroundEngine)
                self.ahead.fill(step, lambda each: self._answer(engine.submit, each, first, stop))
                rollouts = None
        if rollouts is None:
            with phase("idle"):
                rollouts = self.ahead.take(step)
        with phase("reward"):
            return rollouts, _Asked(self._scoring(step, rollouts), phase)

    def _scoring(self, step: int, rollouts: Rollouts) -> Scoring:
        state = TrainerState(epoch=self.stream.epoch(step), global_step=step - 1, max_steps=self.spec.steps)
        return self.rewards.start(rollouts, where=f"step {step}", state=state)

    def _answer(
        self, ask: Callable[..., Answer], step: int, first: int, stop: int, progress: Progress | None = None
    ) -> Answer:
        return ask(
            self.stream.draw(self.stream.first(step - 1) + first, stop - first),
            self.spec.num_generations,
            max_completion_length=self.spec.sampling.max_completion_length,
            key=SamplingKey(self.spec.seed, "train", step),
            progress=progress,
        )

    def state(self) -> dict[str, float]:
        return self.rewards.state()

    def restore(self, state: Mapping[str, float]) -> None:
        self.rewards.restore(state)


@dataclass(frozen=True)
class _Asked:
    """Rewards that were asked for; waiting for them counts as their time."""

    scoring: Scoring
    phase: Phase

    def finish(self) -> RewardTable:
        with self.phase("reward"):
            return self.scoring.finish()

    def cancel(self) -> None:
        self.scoring.cancel()


@dataclass(frozen=True)
class Known:
    """Rewards that need no waiting for."""

    table: RewardTable

    def finish(self) -> RewardTable:
        return self.table

    def cancel(self) -> None:
        pass


@dataclass(frozen=True)
class LoggedCollector:
    """Reads completions and rewards from the data. Nobody knows the log-probabilities they were sampled with: NaN."""

    logged: LoggedSet
    stream: PromptStream

    def collect(self, step: int, first: int, stop: int, *, phase: Phase) -> tuple[Rollouts, Known]:
        prompts = self.stream.at(step - 1)[first:stop]
        groups = [self.logged.groups[index] for index in self.stream.indices(step - 1)[first:stop]]
        rollouts, rewards = logged_rollouts(groups, prompts)
        return rollouts, Known(RewardTable(rewards))

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        pass


def logged_rollouts(groups: Sequence[LoggedGroup], prompts: Sequence[Prompt]) -> tuple[Rollouts, Tensor]:
    """Logged completions of these prompts as if they had been sampled, and their rewards [P, K]."""
    tokens = token_groups(groups)
    mask = tokens.mask
    rollouts = Rollouts(
        prompts=tuple(prompts),
        groups=tokens,
        texts=tuple(completion.text for group in groups for completion in group.completions),
        logprobs=torch.full(mask.shape, torch.nan).masked_fill(~mask, 0.0),
        finish_reasons=tuple(completion.finish_reason for group in groups for completion in group.completions),
        labels={
            name: torch.tensor([[completion.labels[name] for completion in group.completions] for group in groups])
            for name in groups[0].completions[0].labels
        },
    )
    return rollouts, torch.tensor([[completion.reward for completion in group.completions] for group in groups])
