"""Python objects given instead of a recipe's paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from dar.algorithms.base import Algorithm
from dar.reward_model.reward import Classifier
from dar.rewards import RewardFunction
from dar.rollout.protocol import Engine
from dar.run.recorder import Callback


@dataclass(frozen=True)
class Objects:
    """Python objects that stand in for what a recipe would load; None = as the recipe says.

    gold: rewards of `evaluation.rewards`. facts: more to be said in environment.json.
    """

    model: Any | None = None
    tokenizer: Any | None = None
    reference: Any | None = None
    train_rows: Iterable[Any] | None = None
    heldout_rows: Iterable[Any] | None = None
    rewards: dict[str, RewardFunction | Classifier] = field(default_factory=dict)
    gold: dict[str, RewardFunction] = field(default_factory=dict)
    engine: Engine | None = None
    facts: Callable[[], Mapping[str, Any]] = dict
    lora: Any | None = None
    callbacks: Sequence[Callback | TrainerCallback] = ()
    algorithm: Algorithm | None = None


NOTHING = Objects()
"""All as the recipe says."""
