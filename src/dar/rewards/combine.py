"""Several rewards with weights, scored together: each one's values are kept, their weighted sum is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dar.batch import Rollouts
from dar.errors import RewardError
from dar.rewards.function import RewardFunction, call_reward


@dataclass(frozen=True)
class Reward:
    """A reward function with its name in metrics and its factor in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True)
class RewardTable:
    """What the rewards said.

    total: [P, K] fp32, Σ weight · value over the rewards that apply to the row.
    parts: per reward, [P, K] fp32 unweighted, NaN where it does not apply (a mark, never a value to compute with).
    """

    total: Tensor
    parts: dict[str, Tensor]

    def metrics(self) -> dict[str, float]:
        """`reward`, `reward_std` and `rewards/<name>/mean|std`, as TRL's GRPO trainer defines them.

        `reward_std` is the mean of the groups' sample standard deviations (of the batch's with one completion per
        prompt); a part's mean and std are over the rows it applies to.
        """
        spread = _sample_std(self.total.flatten()) if self.total.shape[1] == 1 else float(self.total.std(1).mean())
        found = {"reward": float(self.total.mean()), "reward_std": spread}
        for name, values in self.parts.items():
            applies = values[~values.isnan()]
            if len(applies):
                found[f"rewards/{name}/mean"] = float(applies.mean())
                found[f"rewards/{name}/std"] = _sample_std(applies)
        return found


def _sample_std(values: Tensor) -> float:
    """The sample standard deviation; 0 for a single value, which has no spread."""
    return float(values.std()) if len(values) > 1 else 0.0


class RewardSet:
    """The rewards of a run."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ValueError("a RewardSet needs at least one reward")
        self.rewards = tuple(rewards)

    def score(self, rollouts: Rollouts, *, where: str) -> RewardTable:
        """Scores every completion with every reward.

        Args:
            rollouts: what was sampled.
            where: for messages, such as `step 7`.

        Raises:
            RewardError: a function failed, or no reward applies to some completion.
        """
        shape = (len(rollouts.prompts), rollouts.num_generations)
        arguments = _arguments(rollouts)
        parts: dict[str, Tensor] = {}
        total = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        applied = torch.zeros(len(total), dtype=torch.bool)
        for reward in self.rewards:
            values = call_reward(reward.name, reward.function, arguments, where=where)
            column = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
            applies = ~column.isnan()
            total[applies] += reward.weight * column[applies]
            applied |= applies
            parts[reward.name] = column.float().reshape(shape)
        if not applied.all():
            row = int((~applied).nonzero()[0])
            raise RewardError(
                f"no reward applies to row {row} at {where}: all returned None. Its completion was: "
                f"{rollouts.texts[row][:300]}"
            )
        return RewardTable(total.float().reshape(shape), parts)


def _arguments(rollouts: Rollouts) -> dict[str, object]:
    """TRL's keyword arguments: conversational prompts get conversational completions, strings get strings."""
    per_row = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    completions = [
        text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(per_row, rollouts.texts, strict=True)
    ]
    lengths = rollouts.groups.lengths().tolist()
    ids = [row[:length] for row, length in zip(rollouts.groups.completion_ids.tolist(), lengths, strict=True)]
    names = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in per_row] for name in names}
    return {
        **columns,
        "prompts": [prompt.content for prompt in per_row],
        "completions": completions,
        "completion_ids": ids,
        "finish_reasons": list(rollouts.finish_reasons),
    }
