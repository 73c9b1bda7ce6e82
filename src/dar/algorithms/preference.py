"""Methods that compare two completions of a prompt: offline on the data's pairs, online on pairs of own samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference, weighted
from dar.batch import Experience, TokenOutputs, Weighted
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

    A row's advantage says what it is: +1 chosen, −1 rejected; every other row has weight 0. A prompt whose two
    completions have equal rewards gives no pair.

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

    def weigh(self, experience: Experience) -> tuple[Weighted, Metrics]:
        require_reference(self, experience)
        signs = pair_signs(experience.rewards if self.pairs == "best_vs_worst" else experience.rewards[:, :2])
        missing = experience.rewards.shape[1] - signs.shape[1]
        rows = experience.to_rows(torch.nn.functional.pad(signs, (0, missing)))
        num_pairs = float((rows > 0).sum())
        metrics = {"pairs/tied_fraction": 1.0 - num_pairs / len(signs)}
        # A batch of ties has no pair to average over, and no loss either.
        return weighted(experience, rows, rows.abs(), denominator=num_pairs or 1.0), metrics

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        assert batch.ref_logprobs is not None
        chosen, rejected = batch.advantages > 0, batch.advantages < 0
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
            "rewards/accuracies": Mean.of((margins > 0).float()),
        }
        return Terms(torch.zeros_like(current).masked_scatter(chosen, losses.to(current.dtype)), means)


def pair_signs(rewards: Tensor) -> Tensor:
    """[P, K] rewards → [P, K] of +1 at the best completion, −1 at the worst (the first of equals), 0 elsewhere.

    A group whose best equals its worst has no pair; a completion without a reward (NaN) is in none.
    """
    absent = rewards.isnan()
    highest = rewards.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(absent, torch.inf).amin(1, keepdim=True)
    best = (rewards == highest).to(torch.uint8).argmax(1, keepdim=True)
    worst = (rewards == lowest).to(torch.uint8).argmax(1, keepdim=True)
    signs = torch.zeros_like(rewards, dtype=torch.float32).scatter_(1, best, 1.0).scatter_(1, worst, -1.0)
    return signs.masked_fill(highest <= lowest, 0.0)


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
