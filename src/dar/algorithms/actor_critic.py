"""Policy gradients with a critic: PPO, and PPO with both of DAR's KL terms."""

from __future__ import annotations

import torch
from torch import Tensor

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference
from dar.batch import Batch, TokenOutputs, Weighted
from dar.config.actor_critic import ActorCriticSpec, AnyActorCritic, DualPPOSpec, PPOSpec
from dar.objectives.actor_critic import clipped_value_loss, token_rewards, whitened
from dar.objectives.policy_gradient import clipped_surrogate, clipped_tokens, kl_to_old
from dar.ops import Mean, masked_mean, masked_sum


class _ActorCritic(Algorithm):
    """Token rewards with the KL to π₀, generalised advantages, the clipped surrogate and a clipped value loss."""

    needs_values = True

    def __init__(self, spec: ActorCriticSpec, *, kl_coef: float) -> None:
        self.spec = spec
        self.kl_coef = kl_coef
        self.updates = spec.updates
        self.needs_reference = kl_coef > 0

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        spec, mask, values = self.spec, batch.mask, batch.values
        require_reference(self, batch)
        if values is None:
            raise ValueError(f"{type(self).__name__} reads a critic, but the batch has no values")
        rewards = token_rewards(
            batch.to_rows(batch.rewards),
            batch.old_logprobs,
            batch.ref_logprobs,
            mask,
            kl_coef=self.kl_coef,
        )
        advantages = adv.gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam)
        returns = advantages + values
        weighted = batch.weighted(
            whitened(advantages, mask),
            torch.ones(batch.groups.num_rows),
            denominator=float(mask.sum()),
            tokens={"returns": returns},
        )
        residual = (returns - values)[mask].double()
        spread = returns[mask].double().var(correction=0)
        metrics = {
            "value/mean": float(masked_mean(values, mask)),
            "value/return_mean": float(masked_mean(returns, mask)),
        }
        if spread > 0:
            metrics["value/explained_variance"] = 1.0 - float(residual.var(correction=0) / spread)
        return weighted, metrics

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        spec, mask, logprobs = self.spec, batch.mask, outputs.logprobs
        if outputs.values is None or batch.values is None:
            raise ValueError(f"{type(self).__name__} trains a critic, but the module returned no values")
        bounds = {"clip_low": spec.clip_low, "clip_high": spec.clip_high}
        policy = clipped_surrogate(logprobs, batch.old_logprobs, batch.advantages, mask, **bounds)
        value = clipped_value_loss(
            outputs.values, batch.values, batch.tokens["returns"], mask, clip_value=spec.clip_value
        )
        per_token = policy + spec.value_coef * value + self._penalty(logprobs, batch)
        clipped = clipped_tokens((logprobs.detach() - batch.old_logprobs)[mask], batch.advantages[mask], **bounds)
        means = {"clip_ratio/region_mean": Mean.of(clipped), "loss/value": Mean.of(value.detach(), mask)}
        return Terms(batch.weights * masked_sum(per_token, mask), means)

    def _penalty(self, logprobs: Tensor, batch: Weighted) -> Tensor | float:
        return 0.0


class PPO(_ActorCritic):
    """Proximal policy optimization for completions, token by token.

        R_t = −β (log π_t − log π₀)_t + 1[t = T] r,  Â = GAE(R, V), whitened
        L = mean_t [ −min(ρ_t Â_t, clip(ρ_t) Â_t) + c_v ½ max((V − G)², (clip(V) − G)²) ]

    Schulman et al. 2017, arXiv:1707.06347, with the details of TRL's PPO trainer.
    """

    def __init__(self, spec: PPOSpec) -> None:
        super().__init__(spec, kl_coef=spec.kl_coef)


class DualPPO(_ActorCritic):
    """PPO whose reward carries αβ of KL to π₀, and whose loss (1−α)β of KL(π_θ‖π_t); derived.

    Named in He et al. 2026, arXiv:2602.11523, as an ablation; its formula was not found. α = 1 is PPO with β.
    """

    def __init__(self, spec: DualPPOSpec) -> None:
        super().__init__(spec, kl_coef=spec.alpha * spec.beta)
        self.old_coef = (1 - spec.alpha) * spec.beta

    def _penalty(self, logprobs: Tensor, batch: Weighted) -> Tensor | float:
        return self.old_coef * kl_to_old(logprobs, batch.old_logprobs, batch.mask)


def build(spec: AnyActorCritic) -> Algorithm:
    """The method a spec stands for."""
    match spec:
        case PPOSpec():
            return PPO(spec)
        case DualPPOSpec():
            return DualPPO(spec)
