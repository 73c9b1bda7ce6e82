"""Policy gradients on the steps of a flow: Flow-GRPO, and GRPO-Guard, which keeps its ratios upright."""

from __future__ import annotations

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
        plain = outputs.logprobs.detach() - batch.old_logprobs
        means = {
            "clip_ratio/region_mean": Mean.of(clipped_tokens(log_ratios.detach()[mask], advantages[mask], **bounds))
        }
        for step in range(mask.shape[1]):
            means |= {f"ratio/step_{step}/{name}": mean for name, mean in _spread(plain[:, step], log_ratios[:, step])}
        return Terms(batch.weights * masked_sum(per_step, mask), means)


def _spread(plain: Tensor, used: Tensor) -> list[tuple[str, Mean]]:
    """Mean and mean square of a step's log-ratios, before and after they are set upright."""
    both = {"plain": plain, "used": used.detach()}
    return [
        (f"{name}{suffix}", Mean.of(values**power))
        for name, values in both.items()
        for suffix, power in (("", 1), ("_squared", 2))
    ]


def build(spec: AnyFlow) -> FlowGRPO:
    """The method a spec stands for."""
    return FlowGRPO(spec)
