"""The spec of a reward model's training: a recipe of `dar reward-model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dar.config.base import Count, NotNegative, Rows, Seed, Spec
from dar.config.data import RowsSpec
from dar.config.model import ModelSpec
from dar.config.optim import AdamWSpec, AnyOptim
from dar.config.run import CheckpointSpec, ComputeSpec
from dar.files.paths import expanded


class PairDataSpec(RowsSpec):
    """Preference pairs to train on and pairs held out: `prompt`, `chosen` and `rejected`."""

    max_length: Count | None = None
    """Longest conversation (prompt with completion) in tokens; by default what the model reads."""
    long_pairs: Literal["refuse", "drop"] = "refuse"
    """What to do, before training starts, with pairs that have a longer one: stop, or leave them out and count them."""


class BradleyTerrySpec(Spec):
    """−log σ(r_c − r_r − margin) + centering_coef · (r_c + r_r)², mean over pairs."""

    margin_column: str | None = None
    """Column with the margin of each pair, in reward units; by default there is none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrong labels."""
    centering_coef: NotNegative = 0.0
    """Factor of the term that holds a pair's mean score near 0 (Eisenstein et al. 2023, arXiv:2312.09244: 0.01)."""


class RewardModelSpec(Spec):
    """A recipe of `dar reward-model`."""

    model: ModelSpec
    """What to start from: a causal language model, or a sequence classifier with one output."""
    data: PairDataSpec
    """Preference pairs: a path, or a mapping."""
    loss: BradleyTerrySpec = Field(default_factory=BradleyTerrySpec)
    """The loss of a pair."""
    optim: AnyOptim = Field(default_factory=AdamWSpec)
    """The optimizer: a name, or a mapping with `type`."""
    pairs_per_step: Rows = 16
    """Pairs of one optimizer step."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the pairs, to the nearest step. This or `steps`."""
    steps: Count | None = None
    """Optimizer steps. This or `epochs`."""
    seed: Seed = 0
    """Seed of the order of pairs, and of a new adapter's weights."""
    output_dir: Annotated[str, AfterValidator(expanded)]
    """The run folder."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """What is saved to continue from."""
    runtime: ComputeSpec = Field(default_factory=ComputeSpec)
    """Where and how it runs."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardModelSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say how long to train: either steps or epochs (max_steps or num_train_epochs), not both")
        if self.model.rank_schedule is not None:
            raise ValueError("model.lora.rank shrinks in policies only; for a reward model it is a number")
        if self.optim.null_space is not None:
            raise ValueError("optim.null_space restricts policies; a reward model has no use for it")
        if self.checkpoint.best is not None:
            raise ValueError(
                "checkpoint.best chooses among policies; a reward model is evaluated before and after only"
            )
        return self

    def num_steps(self, num_pairs: int) -> int:
        """Optimizer steps for that many pairs."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * num_pairs / self.pairs_per_step))
