"""Policy gradients on the steps of a flow: Flow-GRPO, and GRPO-Guard, which keeps its ratios upright."""

from __future__ import annotations

import torch

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
        for name, ratios in {"plain": plain.detach(), "used": used.detach()}.items():
            clipped = clipped_tokens(ratios.flatten(), advantages.flatten(), **bounds).view(mask.shape)
            for step in range(mask.shape[1]):
                found = {"": ratios, "_squared": ratios**2, "_clipped": clipped}
                means |= {f"ratio/step_{step}/{name}{key}": Mean.of(each[:, step]) for key, each in found.items()}
            means["clip_ratio/region_mean"] = Mean.of(clipped)
        return Terms(batch.weights * masked_sum(per_step, mask), means)
