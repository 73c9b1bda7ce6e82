"""Policy gradients on the steps of a flow: Flow-GRPO, and GRPO-Guard, which keeps its ratios upright."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dar.algorithms.base import Terms
from dar.algorithms.policy_gradient import GRPO
from dar.batch import TokenOutputs, Weighted
from dar.config.flow import AnyFlow
from dar.objectives.flow import step_log_ratios
from dar.objectives.policy_gradient import clipped_surrogate, clipped_tokens
from dar.ops import Mean, kl_k3, masked_sum


class FlowGRPO(GRPO):
    """GRPO over denoising steps, each with its own ratio.

        L = −mean_i (1/T) Σ_k δ_k min(ρ_k A_i, clip(ρ_k) A_i),   A_i = (r_i − mean r)/(std r + ε)

    ρ_k and δ_k as the spec says. Liu et al. 2025, arXiv:2505.05470; GRPO-Guard, arXiv:2510.22319.
    """

    def __init__(self, spec: AnyFlow) -> None:
        super().__init__(spec)
        self.spec = spec

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        steps, mask = outputs.steps, batch.mask
        plain = outputs.logprobs - batch.old_logprobs
        used = step_log_ratios(plain, steps["shift"], steps["deviation"], ratio=self.spec.ratio)
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        per_step = clipped_surrogate(used, torch.zeros_like(used), batch.advantages, mask, **bounds)
        if self.spec.reweight:
            per_step = per_step * steps["reweight"]
        if batch.ref_logprobs is not None and self.beta > 0:
            per_step = per_step + self.beta * kl_k3(outputs.logprobs, batch.ref_logprobs.detach())
        advantages, means = batch.advantages.unsqueeze(1).expand_as(mask), dict[str, Mean]()
        for name, ratios in {"plain": plain.detach(), self.spec.ratio: used.detach()}.items():
            clipped = clipped_tokens(ratios, advantages, **bounds)
            for what, values in ({"clipped": clipped} | _measured(ratios, **bounds)).items():
                for step, kept in enumerate(mask.T):
                    means[f"ratio/step_{step}/{name}/{what}"] = Mean.of(values[:, step], kept)
            means["clip_ratio/region_mean"] = Mean.of(clipped, mask)
        return Terms(batch.weights * masked_sum(per_step, mask), means)


def _measured(log_ratios: Tensor, *, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    """[B, T] each: what means are taken of, the log-ratio, its square, and whether it is in each bin."""
    edges = (-math.inf, -16, -4, -1, 0, 1, 4, 16)  # in clip ranges: −1 and 1 are the bounds
    low, high = torch.tensor([1 - clip_low, 1 + clip_high], dtype=torch.float64).log().tolist()
    starts = [edge * high if edge > 0 else -edge * low if edge else 0.0 for edge in edges[1:]]
    bins = torch.bucketize(log_ratios, log_ratios.new_tensor(starts), right=True)
    shares = {f"from_{edge:g}": bins == place for place, edge in enumerate(edges)}
    return {"mean": log_ratios, "mean_square": log_ratios**2, **shares}
