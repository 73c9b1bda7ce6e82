"""Realigning old preference pairs to new rules: TRACE."""

from __future__ import annotations

import torch
from torch import Tensor

from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference
from dar.batch import Batch, Role, TokenOutputs, Weighted
from dar.config.realignment import TRACESpec
from dar.objectives.realignment import Triage, conflict_losses, triage
from dar.ops import Mean, masked_sum

IMPACT = "impact"
"""Name among a batch's labels of w_i · N, the pairs' impact weights times the number of conflicting pairs."""

ROLES = {
    Triage.INVERT: (Role.REJECTED, Role.CHOSEN),
    Triage.PUNISH: (Role.REJECTED, Role.REJECTED),
    Triage.RETAIN: (Role.HELD, Role.NONE),
}
"""What becomes of a pair's two completions, in the old order."""


class TRACE(Algorithm):
    """Old pairs, triaged by verdicts on their completions: DPO on swapped pairs, NPO on both of others, KL on the rest.

        L = Σ_conflict w_i ℓ_i + kl_coef · mean_retain( mean_t KL(π₀‖π_θ)_t ),   Σ_conflict w_i = 1

    The reward of a completion is its verdict: 1 complies, 0 violates; the chosen one comes first. Of a batch, the first
    sum is estimated by the mean of N w_i ℓ_i over its conflicting pairs, N being their number in all the data: given
    how many conflicting pairs a batch has, these are a uniform draw from the N, so each has the expectation
    (1/N) Σ_i N w_i ℓ_i, which is the sum. A batch without such pairs has no first term, one without retained pairs no
    second.

    A row's role says what it is: chosen, to be pushed down, or held to π₀. The KL is of the chosen completion alone; a
    retained pair's rejected one has weight 0 and is left out.

    arXiv:2511.02623. In the authors' code the KL terms of all retained pairs are added up, not averaged: it then
    outweighs the first sum by their number. The mean is chosen here, the counterpart of weights that sum to 1.
    """

    needs_reference = True
    reads_rows_together = True

    def __init__(self, spec: TRACESpec) -> None:
        self.spec = spec

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        complies = batch.rewards > 0
        if complies.shape[1] != 2:
            raise ValueError(f"TRACE needs the verdicts on two completions per prompt, got {complies.shape[1]}")
        roles = torch.tensor([ROLES[triage(chosen, rejected)] for chosen, rejected in complies.tolist()])
        is_retained = roles[:, 0] == Role.HELD
        is_inverted, is_punished = (roles[:, 1] == role for role in (Role.CHOSEN, Role.REJECTED))
        impact = batch.labels[IMPACT][:, 0]
        conflict = torch.where(is_retained, 0.0, impact) / (~is_retained).sum().clamp(min=1)
        held = is_retained * (self.spec.kl_coef / is_retained.sum().clamp(min=1))
        weights = torch.stack([conflict + held, conflict], dim=1)
        metrics = {
            "trace/invert_fraction": float(is_inverted.float().mean()),
            "trace/punish_fraction": float(is_punished.float().mean()),
            "trace/retain_fraction": float(is_retained.float().mean()),
        }
        # The two means are in the weights already.
        roles = roles.flatten()
        signs = roles.masked_fill(roles == Role.HELD, 0).float()
        return batch.weighted(signs, weights.flatten(), denominator=1.0, roles=roles), metrics

    def held_rows(self, batch: Weighted) -> Tensor:
        return (batch.weights > 0) & (batch.roles == Role.HELD)

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        assert batch.ref_logprobs is not None
        assert batch.roles is not None
        current = masked_sum(outputs.logprobs, batch.mask)
        reference = masked_sum(batch.ref_logprobs, batch.mask)
        # Rows that only take part so that every rank does have weight 0: no loss, but still a graph.
        losses, means = current * 0.0, dict[str, Mean]()
        conflict = (batch.weights > 0) & (batch.roles.abs() == Role.CHOSEN)
        if conflict.any():
            # The two rows of such a pair have the same weight, and stand one after the other.
            is_inverted = batch.roles[conflict].reshape(-1, 2)[:, 1] == Role.CHOSEN
            pairs, ref_pairs = (each[conflict].reshape(-1, 2) for each in (current, reference))
            found = conflict_losses(pairs, ref_pairs, is_inverted, beta=self.spec.beta).flatten()
            losses = losses.masked_scatter(conflict, (batch.weights[conflict] * found).to(losses.dtype))
            means |= self._conflict_means((pairs - ref_pairs).detach(), is_inverted)
        held = self.held_rows(batch)
        if held.any():
            if outputs.ref_kl is None:
                raise ValueError("TRACE holds retained completions to π₀ by their KL, and got none")
            kl = masked_sum(outputs.ref_kl, batch.mask)[held]
            lengths = batch.mask.sum(1)[held]
            losses = losses.masked_scatter(held, (batch.weights[held] * kl / lengths).to(losses.dtype))
            means["trace/retain_kl"] = Mean.of(kl.detach() / lengths)
        return Terms(losses, means)

    def _conflict_means(self, log_ratios: Tensor, is_inverted: Tensor) -> dict[str, Mean]:
        """What is worth logging of [N, 2] log-ratios to π₀, in the old order."""
        means: dict[str, Mean] = {}
        inverted, punished = log_ratios[is_inverted], log_ratios[~is_inverted]
        if len(inverted):
            rejected, chosen = (self.spec.beta * inverted).unbind(1)
            means["rewards/chosen"], means["rewards/rejected"] = Mean.of(chosen), Mean.of(rejected)
            means["rewards/margins"] = Mean.of(chosen - rejected)
            means["rewards/accuracies"] = Mean.of((chosen - rejected).heaviside(chosen.new_tensor(0.5)))
        if len(punished):
            means["trace/punish_log_ratio"] = Mean.of(punished)
        return means
