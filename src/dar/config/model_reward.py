"""The spec of a reward model in use."""

from __future__ import annotations

from typing import Literal

from dar.config.base import Count, Spec
from dar.config.model import ModelSourceSpec
from dar.config.reward import RewardSpec


class CalibrationSpec(Spec):
    """Shift a reward, and scale it, so that completions of the initial policy have mean 0 and standard deviation 1."""

    num_prompts: Count = 64
    """How many of the training prompts, from the first row on, are completed once each."""
    scale: bool = True
    """Also divide by their standard deviation; otherwise only the mean is taken off."""


class ModelRewardSpec(RewardSpec):
    """A reward model: any transformers sequence-classification model with one output, with its own tokenizer and chat
    template. Plain prompts are read with the completion right behind them."""

    type: Literal["model"] = "model"
    model: ModelSourceSpec
    """The reward model: a Hub id or a folder, with safetensors weights."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:N` or `mps`; by default the policy's."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products, as in `runtime`. The score itself is always fp32."""
    max_length: Count | None = None
    """Longest conversation in tokens of the reward model; by default what it reads."""
    too_long: Literal["refuse", "keep_end"] = "refuse"
    """A longer one: stop the run, or read its end only."""
    max_tokens_per_batch: Count = 8192
    """Tokens of one forward pass, padding counted."""
    calibrate: CalibrationSpec | None = None
    """Shift and scale by the completions of the initial policy; by default scores are taken as they are."""
