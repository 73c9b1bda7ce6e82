"""Policy gradients on the steps of a flow: Flow-GRPO, and GRPO-Guard, which keeps its ratios upright."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar.algorithms.base import Terms
from dar.algorithms.policy_gradient import GroupRelative
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.flow import FlowGRPOSpec, GRPOGuardSpec
from dar.objectives.flow import step_log_ratios
from dar.objectives.policy_gradient import clipped_surrogate, clipped_tokens
from dar.ops import Mean, kl_k3, masked_sum

AnyFlow = FlowGRPOSpec | GRPOGuardSpec


class FlowGRPO(GroupRelative):
    """GRPO over denoising steps, each with its own ratio.

        L = −mean_i (1/T) Σ_k δ_k min(ρ_k A_i, clip(ρ_k) A_i),   A_i = (r_i − mean r)/(std r + ε)

    ρ_k and δ_k as the spec says. Liu et al. 2025, arXiv:2505.05470; GRPO-Guard, arXiv:2510.22319.
    """

    def __init__(self, spec: AnyFlow) -> None:
        super().__init__(beta=spec.beta, clip_low=spec.clip_low, clip_high=spec.clip_high, updates=spec.updates)
        self.spec = spec

    def weigh(self, batch: Batch) -> tuple[Weighted, dict[str, float]]:
        rows = self._standardized(batch)
        return batch.weighted(rows, self._carrying(rows) / batch.mask.sum(1).float()), {}

    def loads(self, batch: Weighted) -> None:
        """Not known: of a density's logarithm nothing says how long a step's part of the gradient is."""

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        steps, mask = outputs.steps, batch.mask
        log_ratios = step_log_ratios(
            outputs.logprobs, batch.old_logprobs, steps["shift"], steps["deviation"], ratio=self.spec.ratio
        )
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        per_step = clipped_surrogate(log_ratios, torch.zeros_like(log_ratios), batch.advantages, mask, **bounds)
        if self.spec.reweight:
            per_step = per_step * steps["reweight"]
        if batch.ref_logprobs is not None and self.beta > 0:
            per_step = per_step + self.beta * kl_k3(outputs.logprobs, batch.ref_logprobs.detach())
        advantages = batch.advantages.unsqueeze(1).expand_as(mask)
        means = {
            "clip_ratio/region_mean": Mean.of(clipped_tokens(log_ratios.detach()[mask], advantages[mask], **bounds))
        }
        means |= _spread("plain", outputs.logprobs.detach() - batch.old_logprobs, mask, **bounds)
        if self.spec.ratio != "plain":
            means |= _spread("used", log_ratios.detach(), mask, **bounds)
        return Terms(batch.weights * masked_sum(per_step, mask), means)


_EDGES = (-math.inf, -16, -4, -1, 0, 1, 4, 16)
"""Where the bins of a step's log-ratios begin; −1 and 1 are the clip's bounds."""


def _spread(name: str, log_ratios: Tensor, mask: Tensor, *, clip_low: float, clip_high: float) -> dict[str, Mean]:
    """Of each step's log-ratios the mean, the mean square, and the share in each bin."""
    low, high = torch.tensor([1 - clip_low, 1 + clip_high], dtype=torch.float64).log().tolist()
    starts = [edge * high if edge > 0 else -edge * low if edge else 0.0 for edge in _EDGES[1:]]
    bins = torch.bucketize(log_ratios, log_ratios.new_tensor(starts), right=True)
    shares = {f"from_{edge:g}": bins == place for place, edge in enumerate(_EDGES)}
    measured = {"mean": log_ratios, "mean_square": log_ratios**2, **shares}
    totals = torch.stack([each.double().masked_fill(~mask, 0.0) for each in measured.values()]).sum(1).tolist()
    return {
        f"ratio/step_{step}/{name}/{what}": Mean(total, count)
        for what, row in zip(measured, totals, strict=True)
        for step, (total, count) in enumerate(zip(row, mask.sum(0).tolist(), strict=True))
        if count
    }


def build(spec: AnyFlow) -> FlowGRPO:
    """The method a spec stands for."""
    return FlowGRPO(spec)
