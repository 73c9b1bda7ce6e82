"""The spec of a controller's training: a recipe of `dar control`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dar.config.base import Count, NotNegative, Positive, Rows, Seed, Spec
from dar.config.run import CheckpointSpec, ComputeSpec
from dar.files.paths import expanded

Finite = Annotated[float, Field(allow_inf_nan=False)]


class VariationSpec(Spec):
    """How a physical parameter varies: in episode i it is center + spread · z."""

    center: Finite | None = None
    """By default what the model has."""
    spread: NotNegative
    """In the parameter's units; 0 sets it to `center`."""
    law: Literal["uniform", "gaussian"] | Positive = "uniform"
    """z: drawn uniform in [−1, 1], drawn standard normal and cut off at ±3, or for a number ω sin(ω · i)."""


class AdaptiveRankSpec(Spec):
    """AdaRL: every so many steps each layer is cut to the rank that holds a share of its singular values."""

    energy: Annotated[float, Field(gt=0, le=1)] = 0.98
    """β: the largest rank whose singular values add up to at most this share of all."""
    every: Count
    """d_t, environment steps from one truncation to the next."""
    warmup_steps: Count = 2000
    """Steps over which the learning rate rises from 0 after a truncation; it then falls along a cosine to the next."""


class ControlEvaluationSpec(Spec):
    """Robust evaluation: the return of the deterministic policy on the model as it is, and perturbed."""

    every: Annotated[int, Field(ge=0)] = 0
    """Every so many environment steps; 0 = only before and after training."""
    episodes: Rows = 5
    """Of each value, from the same starts everywhere."""
    perturbations: dict[str, list[Finite]] = Field(default_factory=dict)
    """Values of parameters, named as in `uncertainty`; one at a time, all else as the model has it."""


class ControlSpec(Spec):
    """A recipe of `dar control`."""

    environment: str
    """A MuJoCo environment of gymnasium, such as `Hopper-v5`."""
    uncertainty: dict[str, VariationSpec] = Field(default_factory=dict)
    """What varies while training, by names from the environment's MuJoCo file: `option.gravity.2`,
    `geom.NAME.density`, `geom.NAME.size.1`, `joint.NAME.damping.0`; likewise of a `body` or an `actuator`."""
    rank: Count | AdaptiveRankSpec | None = None
    """Of the layers between hidden layers: a number, or a mapping (AdaRL); by default they are whole, plain SAC."""
    net: Annotated[list[Rows], Field(min_length=1)] = Field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers, of the actor as of the critics."""
    steps: Count
    """Environment steps, each followed by a gradient step once learning has started."""
    learning_starts: Count = 10_000
    """Steps with uniformly random actions, before anything is learned."""
    learning_rate: Positive = 3e-3
    """Of Adam."""
    batch_size: Rows = 256
    """Transitions of a gradient step."""
    buffer_size: Annotated[int, Field(ge=1000)] = 1_000_000
    """Transitions that are remembered."""
    seed: Seed = 0
    """Of the initial weights, the episodes and everything else."""
    output_dir: Annotated[str, AfterValidator(expanded)]
    """The run folder."""
    log_every: Count = 1000
    """Environment steps of a line of `metrics.jsonl`."""
    evaluation: ControlEvaluationSpec = Field(default_factory=ControlEvaluationSpec)
    """Robust evaluation."""
    checkpoint: CheckpointSpec = Field(default_factory=lambda: CheckpointSpec(every=10_000, keep=1))
    """What is saved to continue from, the replay buffer with it; without it every 10,000 environment steps."""
    device: str = "auto"
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or `cuda:N`."""

    @property
    def runtime(self) -> ComputeSpec:
        return ComputeSpec(device=self.device, precision="fp32")

    @property
    def method(self) -> str:
        """What it is called beside others."""
        rank = self.rank
        return "SAC" if rank is None else f"rank {rank}" if isinstance(rank, int) else f"adaptive, β {rank.energy:g}"

    @model_validator(mode="after")
    def _consistent(self) -> ControlSpec:
        rank, most = self.rank, min((min(pair) for pair in pairwise(self.net)), default=0)
        if rank is not None and (rank if isinstance(rank, int) else 1) > most:
            raise ValueError(f"rank: a layer between the hidden layers of net {self.net} has at most rank {most}")
        if isinstance(rank, AdaptiveRankSpec) and rank.every <= max(rank.warmup_steps, self.learning_starts):
            raise ValueError("rank.every must be more than rank.warmup_steps and more than learning_starts")
        if self.learning_starts >= self.steps:
            raise ValueError(f"learning_starts is {self.learning_starts}: of {self.steps} steps none would learn")
        if self.checkpoint.best is not None:
            raise ValueError("checkpoint.best chooses among language models; a controller's last one is kept")
        return self
