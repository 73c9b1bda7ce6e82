"""Trajectories as rows of steps: what `TokenGroups` is to text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dar.batch import DERIVED, TokenGroups


@dataclass(frozen=True)
class Trajectories(TokenGroups):
    """Denoising trajectories of some prompts; a step stands where text has a token.

    prompt_ids: one tuple per group, its class label alone.
    completion_ids: [B, T] the number of each step, 0 … T − 1.
    states: [B, T, D] fp32, x before each step.
    nexts: [B, T, D] fp32, x after it.
    noises: [B, T, D] fp32, the ε it was sampled with.
    """

    states: Tensor = DERIVED
    nexts: Tensor = DERIVED
    noises: Tensor = DERIVED


def trajectories(labels: tuple[int, ...], num_generations: int, path: Tensor, noises: Tensor) -> Trajectories:
    """All steps of whole trajectories.

    Args:
        labels: P class labels.
        num_generations: K.
        path: [B, T + 1, D] x from t = 1 to t = 0, group-major.
        noises: [B, T, D].
    """
    num_rows, num_steps = noises.shape[:2]
    return Trajectories(
        prompt_ids=tuple((label,) for label in labels),
        group_sizes=(num_generations,) * len(labels),
        completion_ids=torch.arange(num_steps).expand(num_rows, -1).contiguous(),
        mask=torch.ones(num_rows, num_steps, dtype=torch.bool),
        states=path[:, :-1],
        nexts=path[:, 1:],
        noises=noises,
    )
