"""Calibrating reward models on the initial policy: measured once, before the first step, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dar.batch import Prompt
from dar.config.model_reward import CalibrationSpec
from dar.config.run import RunSpec
from dar.errors import CheckpointError
from dar.rewards.combine import completion_arguments
from dar.rewards.function import Call
from dar.rollout.protocol import Engine
from dar.rollout.sampling import SamplingKey


@dataclass(frozen=True)
class Calibration:
    """Shifts and scales of the reward models whose recipe asks for them.

    spec: the recipe.
    rewards: `Calibrated` functions by their name in the checkpoint, with their settings.
    prompts: of the training data, in its order.
    """

    spec: RunSpec
    rewards: Mapping[str, tuple[Any, CalibrationSpec]]
    prompts: Sequence[Prompt]
    engine: Engine

    def run(self) -> None:
        """Completes the first prompts once each with the policy as it is, and takes the statistics of its scores.

        Raises:
            RolloutError, RewardError: sampling or scoring failed, or all scores are the same.
        """
        if not self.rewards:
            return
        most = max(spec.num_prompts for _, spec in self.rewards.values())
        rollouts = self.engine.generate(
            self.prompts[:most],
            1,
            max_completion_length=self.spec.sampling.max_completion_length,
            key=SamplingKey(self.spec.seed, "calibration"),
        )
        arguments = completion_arguments(rollouts)
        for name, (reward, spec) in self.rewards.items():
            first = slice(spec.num_prompts)
            asked = {name: arguments[name][first] for name in ("prompts", "completions", "group_ids")}
            scores = Call(name, reward, asked, where="the calibration").result()
            reward.calibrate(scores, with_scale=spec.scale)

    def state(self) -> dict[str, float]:
        """Shifts and scales, for a checkpoint."""
        return {
            f"{name}.{key}": value
            for name, (reward, _) in self.rewards.items()
            for key, value in (("shift", reward.shift), ("scale", reward.scale))
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes back what `state` gave.

        Raises:
            CheckpointError: a reward was not calibrated in the run that saved it.
        """
        for name, (reward, _) in self.rewards.items():
            if f"{name}.shift" not in state:
                raise CheckpointError(
                    f"the checkpoint has no calibration of the reward model '{name}', and its initial policy is gone: "
                    "remove calibrate from the reward, or start a new run"
                )
            reward.shift, reward.scale = state[f"{name}.shift"], state[f"{name}.scale"]
