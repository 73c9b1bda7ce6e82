"""Trajectories as rows of steps: what `TokenGroups` is to text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dar.batch import DERIVED, TokenGroups


@dataclass(frozen=True)
class Trajectories(TokenGroups):
    """Denoising trajectories of some prompts, all of T steps; a step stands where text has a token.

    prompt_ids: one tuple per group, its class label alone.
    completion_ids: [B, T] the number of each step, 0 … T − 1.
    states: [B, T, D] fp32, x before each step.
    nexts: [B, T, D] fp32, x after it.
    noises: [B, T, D] fp32, the ε it was sampled with.
    """

    is_discrete: ClassVar[bool] = False

    states: Tensor = DERIVED
    nexts: Tensor = DERIVED
    noises: Tensor = DERIVED
