"""Specs of data and of sampling."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dar.config.base import Count, Positive, Spec


class SourceSpec(Spec):
    """One table of rows."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A `.jsonl`, `.json`, `.parquet` or `.csv` file, `package:NAME/inner/path`, or a Hub data set id."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set (a file has just one)."""
    max_rows: Count | None = None
    """Use only the first rows."""


class DataSpec(Spec):
    """Prompts to train on and prompts held out."""

    shorthand: ClassVar[str | None] = "train"

    train: SourceSpec
    """Prompts to sample from during training."""
    heldout: SourceSpec | None = None
    """Prompts never trained on, sampled before, during and after training."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string (used as it is) or a list of messages (the chat template is applied)."""
    wrap_as_user: bool = False
    """Turn a string prompt into one user message, so that the chat template is applied to it."""
    system_prompt: str | None = None
    """A system message put before every conversation that has none."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens; by default the model's context less `sampling.max_completion_length`."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do, before training starts, with prompts longer than that: stop, or leave them out and say how many."""


class SamplingSpec(Spec):
    """How completions are drawn. Truncating samplers (top-k, top-p) would change π_t and are not offered."""

    max_completion_length: Count = 256
    """Most tokens a completion may have."""
    temperature: Positive = 1.0
    """Divides the logits of policy, behaviour policy and reference alike, so the closed form stays exact."""
    mask_truncated: bool = False
    """Leave completions that ran out of room out of the loss (their rewards still count in baselines)."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Scale gradients by π_t(trainer)/π_t(sampler), per token or per completion, where the two differ in precision."""
    correction_cap: Annotated[float, Field(ge=1)] = 2.0
    """Upper bound of that factor."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_samplers(cls, value: Any) -> Any:
        others = ("greedy", "top_k", "top_p", "min_p", "min_new_tokens", "stop")
        found = [key for key in others if isinstance(value, dict) and key in value]
        if found:
            raise ValueError(
                f"{' and '.join(found)} would change π_t: training must sample from the very distribution whose "
                "log-probabilities it reads. Held-out prompts may be sampled otherwise (evaluation.greedy, "
                "evaluation.top_k, evaluation.top_p), and so may dar sample"
            )
        return value
