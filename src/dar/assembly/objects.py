"""Python objects given instead of a recipe's paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from dar.algorithms.base import Algorithm
from dar.reward_model.reward import Classifier
from dar.rewards import RewardFunction
from dar.run.recorder import Callback


@dataclass(frozen=True)
class Objects:
    """Python objects that stand in for what a recipe would load; None = as the recipe says."""

    model: Any | None = None
    tokenizer: Any | None = None
    reference: Any | None = None
    train_rows: Iterable[Any] | None = None
    heldout_rows: Iterable[Any] | None = None
    rewards: dict[str, RewardFunction | Classifier] = field(default_factory=dict)
    lora: Any | None = None
    callbacks: Sequence[Callback | TrainerCallback] = ()
    algorithm: Algorithm | None = None


NOTHING = Objects()
"""All as the recipe says."""
