"""The flat configuration of a reward model's training, under TRL's names where they mean the same."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from dar.config.base import Count, NotNegative, Rows
from dar.config.recipe import build_spec
from dar.config.reward_model import RewardModelSpec
from dar.training_config import FlatConfig


class RewardConfig(FlatConfig):
    """Settings of a reward model's training: a recipe of `dar reward-model`. Raises as `FlatConfig`."""

    recipe = RewardModelSpec
    keys: ClassVar[dict[str, str]] = {
        **FlatConfig.keys,
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "pairs_per_step": "pairs_per_step",
        "max_length": "data.max_length",
        "center_rewards_coefficient": "loss.centering_coef",
    }

    max_steps: Count | None = None
    """Optimizer steps. This or `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the pairs, to the nearest step. This or `max_steps`."""
    pairs_per_step: Rows = 16
    """Pairs of one optimizer step."""
    max_length: Count | None = None
    """Pairs with a conversation of more tokens are left out; by default one that the model cannot read is refused."""
    center_rewards_coefficient: NotNegative = 0.0
    """Factor of the term that holds a pair's mean score near 0."""

    def reward_model_spec(self, *, model: str, train: str, heldout: str | None) -> RewardModelSpec:
        """The recipe this configuration stands for. Raises ConfigError for an impossible setting."""
        data = {"train": train, "heldout": heldout, "long_pairs": "refuse" if self.max_length is None else "drop"}
        raw: dict[str, Any] = {"model": {"path": model}, "data": data}
        return build_spec(self.filled(raw, self.keys), where=type(self).__name__, kind=RewardModelSpec)
