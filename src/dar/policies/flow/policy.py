"""A flow-matching policy with its reference: log-probabilities of denoising steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dar.batch import DERIVED, TokenGroups, TokenOutputs
from dar.policies.base import ModelPolicy
from dar.policies.flow.loading import image_shape
from dar.policies.flow.sde import SDE, gaussian_logprobs
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.saving import save_model


@dataclass(frozen=True)
class Trajectories(TokenGroups):
    """Denoising trajectories of some prompts, all of T steps; a step stands where text has a token.

    prompt_ids: one tuple per group, its class label alone.
    completion_ids: [B, T] the number of each step, 0 … T − 1.
    states: [B, T, D] fp32, x before each step. nexts: after it. noises: the ε it was sampled with.
    """

    is_discrete: ClassVar[bool] = False

    states: Tensor = DERIVED
    nexts: Tensor = DERIVED
    noises: Tensor = DERIVED


class FlowLogprobs(nn.Module):
    """A diffusers model of velocities whose forward returns log-probabilities of given denoising steps, reduced over
    the image's dimensions; the grid `sde` is on the model's device."""

    def __init__(self, model: Any, sde: SDE, reduction: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.model, self.sde = model, sde
        self.reduction: Literal["mean", "sum"] = reduction
        self.shape = image_shape(model)

    def forward(self, groups: Trajectories) -> TokenOutputs:
        """log N(x'; μ_θ, s²) of every step x → x', over the image's dimensions as `reduction` says.

        Beside it, by name: `shift`, (μ_θ − μ_t)·ε, which is 0 at π_θ = π_t; the step's `deviation` s; and its
        `reweight` (`SDE.reweights`). All [B, T] fp32.
        """
        device, size = self.sde.times.device, groups.mask.shape
        states, nexts, noises = (each.to(device).flatten(0, 1) for each in (groups.states, groups.nexts, groups.noises))
        steps = groups.completion_ids.to(device).flatten()
        labels = torch.tensor([label for (label,) in groups.row_prompts()], device=device)
        means = self.means(states, labels.repeat_interleave(size[1]), steps)
        deviations = self.sde.deviations[steps]
        old_means = nexts - deviations.unsqueeze(1) * noises
        shifts = self.reduced((means - old_means) * noises)
        found = {"shift": shifts, "deviation": deviations, "reweight": self.sde.reweights[steps]}
        logprobs = self.reduced(gaussian_logprobs(nexts, means, deviations))
        return TokenOutputs(logprobs.view(size), steps={name: each.view(size) for name, each in found.items()})

    def means(self, states: Tensor, labels: Tensor, steps: Tensor, sde: SDE | None = None) -> Tensor:
        """[N, D] μ_θ of some steps from [N, D] states, [N] labels and [N] step numbers."""
        sde = sde or self.sde
        # diffusers counts time in thousandths.
        velocities = self.model(states.view(-1, *self.shape), sde.times[steps] * 1000, class_labels=labels).sample
        return sde.means(states, velocities.float().flatten(1), steps)

    def reduced(self, per_dimension: Tensor) -> Tensor:
        return per_dimension.mean(1) if self.reduction == "mean" else per_dimension.sum(1)


class FlowPolicy(ModelPolicy[FlowLogprobs]):
    """The trainable velocity model and its π₀. There is no critic, and there are no logits."""

    def __init__(self, model: Any, sde: SDE, precision: Precision, reduction: Literal["mean", "sum"],
                 reference: Any | None = None, *, with_reference: bool = True) -> None:  # fmt: skip
        module = FlowLogprobs(model.to(precision.device).eval(), sde, reduction)
        super().__init__(module, precision, reference=reference, with_reference=with_reference)

    def _frozen(self, model: Any) -> FlowLogprobs:
        model = model.to(self.precision.device).requires_grad_(False).eval()
        return FlowLogprobs(model, self.module.sde, self.module.reduction)

    @contextlib.contextmanager
    def training(self, *, compiled: bool = False) -> Iterator[None]:
        # Stays in eval(): diffusers' label embeddings drop labels at random while training, and a log-probability
        # under another label than the sample's would be no ratio.
        yield

    def outputs(self, groups: TokenGroups, wants: Wants) -> TokenOutputs:
        with self.precision.compute():
            return self.trained(groups)

    def values(self, groups: TokenGroups, *, max_tokens: int) -> Tensor:
        raise ValueError("a flow policy has no critic")

    def write(self, module: FlowLogprobs, folder: Path, *, card: str, notes: Mapping[str, str] | None) -> None:
        save_model(module.model, None, folder, card=card, notes=notes)
