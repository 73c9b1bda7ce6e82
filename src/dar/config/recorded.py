"""The spec of a run that another trainer made."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dar.config.alerts import AnyAlerts
from dar.config.base import Count, Spec
from dar.config.run import BestSpec


class RecordedSpec(Spec):
    """What is known of a run that another trainer made and whose run folder is of this library's kind.

    It takes a recipe's place in config.yaml, and none can be trained from it. None stands for what is not known.
    """

    trainer: str
    """Its class, with the version of its library: `trl.GRPOTrainer 1.16.0`."""
    method: str
    """What it optimises, in the trainer's own words."""
    model: str
    """Where the model came from."""
    output_dir: str
    """The run folder."""
    data: str | None = None
    """What it was trained on."""
    seed: int | None = None
    """Of its random numbers."""
    steps: Count | None = None
    """Optimizer steps that were asked for."""
    prompts_per_step: Count | None = None
    """Prompts of a step, over all processes."""
    num_generations: Count | None = None
    """Completions per prompt."""
    alerts: AnyAlerts = Field(default_factory=list)
    """What it is watched for."""
    best: BestSpec | None = None
    """How the best policy is chosen, where one is kept."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The trainer's own arguments, as it names them."""
