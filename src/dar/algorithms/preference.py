"""Methods that compare two completions of a prompt: offline on the data's pairs, online on pairs of own samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dar.advantages import first_best, is_tied
from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference
from dar.batch import Batch, Role, TokenOutputs, Weighted
from dar.config.preference import (
    AnyPreference,
    ChiPOSpec,
    DPOSpec,
    IPOSpec,
    OnlineDPOSpec,
    OnlineIPOSpec,
    OnlineSLiCSpec,
    PairedSpec,
    SLiCSpec,
)
from dar.objectives.preference import chi_po, dpo, ipo, slic
from dar.ops import Mean, masked_sum

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(chosen, rejected, reference of chosen, of rejected: [N] sequence log-probabilities) → [N] losses."""


class PairedPreference(Algorithm):
    """A preference loss on one pair per prompt, averaged over pairs.

    Rows that are neither chosen nor rejected have weight 0. A prompt whose two completions have equal rewards gives no
    pair.

    Args:
        loss: of the pairs.
        beta: scale of the implicit rewards β·log(π_θ/π₀) that are logged.
        pairs: which completions of a group are compared.
        updates: optimizer steps per batch.
    """

    needs_reference = True
    reads_rows_together = True

    def __init__(self, loss: PairLoss, *, beta: float, pairs: str, updates: int) -> None:
        self.loss = loss
        self.beta = beta
        self.pairs = pairs
        self.updates = updates

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        table = pair_roles(batch.rewards if self.pairs == "best_vs_worst" else batch.rewards[:, :2])
        missing = batch.rewards.shape[1] - table.shape[1]
        roles = batch.to_rows(torch.nn.functional.pad(table, (0, missing)))
        num_pairs = float((roles == Role.CHOSEN).sum())
        metrics = {"pairs/tied_fraction": 1.0 - num_pairs / len(table)}
        # A batch of ties has no pair to average over, and no loss either.
        signs = roles.float()
        return batch.weighted(signs, signs.abs(), denominator=num_pairs or 1.0, roles=roles), metrics

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        assert batch.ref_logprobs is not None
        assert batch.roles is not None
        chosen, rejected = (batch.roles == role for role in (Role.CHOSEN, Role.REJECTED))
        current = masked_sum(outputs.logprobs, batch.mask)
        reference = masked_sum(batch.ref_logprobs, batch.mask)
        # One chosen and one rejected row in each group, so the i-th of each are a pair.
        losses = self.loss(current[chosen], current[rejected], reference[chosen], reference[rejected])
        implicit = self.beta * (current.detach() - reference)
        margins = implicit[chosen] - implicit[rejected]
        means = {
            "rewards/chosen": Mean.of(implicit[chosen]),
            "rewards/rejected": Mean.of(implicit[rejected]),
            "rewards/margins": Mean.of(margins),
            "rewards/accuracies": Mean.of(margins.heaviside(margins.new_tensor(0.5))),
        }
        return Terms(torch.zeros_like(current).masked_scatter(chosen, losses.to(current.dtype)), means)


def pair_roles(rewards: Tensor) -> Tensor:
    """[P, K] rewards → [P, K] roles: the best completion is chosen, the worst rejected (the first of equals).

    A group whose best equals its worst, but for rounding, has no pair; a completion without a reward (NaN) is in none.
    """
    roles = torch.zeros(rewards.shape, dtype=torch.int64)
    roles = roles.scatter(1, first_best(rewards), Role.CHOSEN).scatter(1, first_best(-rewards), Role.REJECTED)
    return roles.masked_fill(is_tied(rewards), Role.NONE)


def build(spec: AnyPreference) -> Algorithm:
    """The method a spec stands for: on pairs of own samples (Guo et al. 2024, arXiv:2402.04792), or on the data's."""
    match spec:
        case OnlineDPOSpec() | DPOSpec():
            loss: PairLoss = partial(dpo, beta=spec.beta)
        case OnlineIPOSpec() | IPOSpec():
            loss = partial(ipo, beta=spec.beta)
        case OnlineSLiCSpec() | SLiCSpec():
            loss = partial(slic, beta=spec.beta)
        case ChiPOSpec():
            loss = partial(chi_po, beta=spec.beta, max_reward=spec.max_reward)
    if isinstance(spec, PairedSpec):
        return PairedPreference(loss, beta=spec.beta, pairs=spec.pairs, updates=spec.updates)
    return PairedPreference(loss, beta=spec.beta, pairs="first_two", updates=1)
