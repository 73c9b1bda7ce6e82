"""Log-probabilities of denoising steps under a flow-matching model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dar.batch import TokenOutputs
from dar.policies.flow.loading import image_shape
from dar.policies.flow.sde import SDE, gaussian_logprobs
from dar.policies.flow.trajectories import Trajectories


class FlowLogprobs(nn.Module):
    """A velocity model whose forward returns log-probabilities of given denoising steps.

    Args:
        model: a diffusers model that predicts velocities from images, times and class labels.
        sde: the trajectory's grid and noise, on the model's device.
        reduction: of a step's log-probabilities over the image's dimensions.
    """

    def __init__(self, model: Any, sde: SDE, *, reduction: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.model = model
        self.sde = sde
        self.reduction: Literal["mean", "sum"] = reduction
        self.shape = image_shape(model.config)

    def forward(self, groups: Trajectories) -> TokenOutputs:
        """log N(x'; μ_θ, s²) of every step x → x', over the image's dimensions as `reduction` says.

        Beside it, by name: `shift`, (μ_θ − μ_t)·ε, which is 0 at π_θ = π_t; the step's `deviation` s; and its
        `reweight` (`SDE.reweights`).

        Returns:
            [B, T] fp32 each.
        """
        device, size = self.sde.times.device, groups.mask.shape
        states, nexts, noises = (each.to(device).flatten(0, 1) for each in (groups.states, groups.nexts, groups.noises))
        steps = groups.completion_ids.to(device).flatten()
        labels = torch.tensor([label for (label,) in groups.row_prompts()], device=device)
        means = self.means(states, labels.repeat_interleave(size[1]), steps)
        deviations = self.sde.deviations[steps]
        old_means = nexts - deviations.unsqueeze(1) * noises
        found = {
            "shift": self.reduced((means - old_means) * noises),
            "deviation": deviations,
            "reweight": self.sde.reweights[steps],
        }
        logprobs = self.reduced(gaussian_logprobs(nexts, means, deviations))
        return TokenOutputs(logprobs.view(size), steps={name: each.view(size) for name, each in found.items()})

    def means(self, states: Tensor, labels: Tensor, steps: Tensor, sde: SDE | None = None) -> Tensor:
        """[N, D] μ_θ of some steps from [N, D] states, [N] labels and [N] step numbers."""
        sde = sde or self.sde
        # diffusers counts time in thousandths.
        times = sde.times[steps] * 1000
        velocities = self.model(states.view(-1, *self.shape), times, class_labels=labels).sample
        return sde.means(states, velocities.float().flatten(1), steps)

    def reduced(self, per_dimension: Tensor) -> Tensor:
        return per_dimension.mean(1) if self.reduction == "mean" else per_dimension.sum(1)
