"""Log-probabilities of denoising steps under a flow-matching model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dar.batch import TokenOutputs
from dar.policies.flow.sde import SDE, gaussian_logprobs
from dar.policies.flow.trajectories import Trajectories


class FlowLogprobs(nn.Module):
    """A velocity model whose forward returns log-probabilities of given denoising steps.

    Args:
        model: a diffusers model that predicts velocities from images, times and class labels.
        sde: the trajectory's grid and noise.
        reduction: of a step's log-probabilities over the image's dimensions.
    """

    def __init__(self, model: Any, sde: SDE, *, reduction: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.model = model
        self.sde = sde
        self.reduction = reduction

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image; D is their product."""
        config = self.model.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return config.in_channels, height, width

    def forward(self, groups: Trajectories) -> TokenOutputs:
        """log N(x'; μ_θ, s²) of every step x → x', over the image's dimensions as `reduction` says.

        Beside it, by name: `shift`, (μ_θ − μ_t)·ε, which is 0 at π_θ = π_t; the step's `deviation` s; and its
        `reweight` (`SDE.reweights`).

        Returns:
            [B, T] fp32 each, 0 where masked.
        """
        mask = groups.mask
        device = next(self.parameters()).device
        steps = groups.completion_ids[mask].to(device)
        states, nexts, noises = (each[mask].to(device) for each in (groups.states, groups.nexts, groups.noises))
        labels = torch.tensor([label for (label,) in groups.row_prompts()])[mask.nonzero()[:, 0]].to(device)
        means = self.means(states, labels, steps)
        deviations = self.sde.deviations.to(device)[steps]
        old_means = nexts - deviations.unsqueeze(1) * noises
        found = {
            "shift": self.reduced((means - old_means) * noises),
            "deviation": deviations,
            "reweight": self.sde.reweights.to(device)[steps],
        }
        logprobs = self.reduced(gaussian_logprobs(nexts, means, deviations))
        return TokenOutputs(
            _unflattened(logprobs, mask), steps={name: _unflattened(each, mask) for name, each in found.items()}
        )

    def means(self, states: Tensor, labels: Tensor, steps: Tensor, sde: SDE | None = None) -> Tensor:
        """[N, D] μ_θ of some steps from [N, D] states, [N] labels and [N] step numbers."""
        sde = sde or self.sde
        times = sde.times.to(states.device)[steps]
        velocities = self.velocities(states, times, labels)
        return SDE(sde.times.to(states.device), sde.sigmas.to(states.device)).means(states, velocities, steps)

    def velocities(self, states: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """[N, D] v_θ(x_t, t, label), fp32."""
        images = states.view(-1, *self.shape)
        # diffusers counts time in thousandths.
        found = self.model(images, times * 1000, class_labels=labels).sample
        return found.float().flatten(1)

    def reduced(self, per_dimension: Tensor) -> Tensor:
        return per_dimension.mean(1) if self.reduction == "mean" else per_dimension.sum(1)


def _unflattened(flat: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(flat.device)
    return torch.zeros(mask.shape, dtype=torch.float32, device=flat.device).masked_scatter(mask, flat)
