"""Least squares on log-ratios: PMD-mean and A*-PO on own samples, QRPO on logged ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dar import advantages as adv
from dar.algorithms.base import Algorithm, Metrics, Terms, require_reference
from dar.batch import Batch, Prompt, TokenOutputs, Weighted
from dar.config.squared import AnySquared, AStarPOSpec, PMDMeanSpec, QRPOSpec
from dar.objectives.squared import optimal_value, squared_error, uniform_optimal_value

OPTIMAL_VALUE = "optimal_value"
"""Name among a batch's labels of V*(x), the same for all completions of a prompt."""


class SquaredRegression(Algorithm):
    """L = mean_i (A_i − β log(π_θ/π_a)(y_i))² / (2β).

    PMD-mean (Kimi k1.5, arXiv:2501.12599; 2602.05933): A = r − mean r of the group, π_a = π_t.
    A*-PO (arXiv:2505.20686): A = r − V*, of samples of π₀, π_a = π₀.
    QRPO (arXiv:2507.08068): the reward is its quantile q under π₀, A = q − V* of a uniform one, π_a = π₀.
    """

    def __init__(self, spec: AnySquared) -> None:
        self.spec = spec
        self.updates = 1 if isinstance(spec, QRPOSpec) else spec.updates
        self.needs_reference = not isinstance(spec, PMDMeanSpec)

    def labels(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        if not isinstance(self.spec, AStarPOSpec):
            return {}
        rewards = [torch.tensor(prompt.columns["ref_rewards"], dtype=torch.float32) for prompt in prompts]
        return {OPTIMAL_VALUE: torch.stack([optimal_value(each, beta=self.spec.value_beta) for each in rewards])}

    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        require_reference(self, batch)
        match self.spec:
            case PMDMeanSpec():
                advantages = adv.group_mean(batch.rewards)
            case AStarPOSpec():
                advantages = batch.rewards - batch.labels[OPTIMAL_VALUE]
            case QRPOSpec():
                advantages = batch.rewards - uniform_optimal_value(self.spec.beta)
        rows = batch.to_rows(advantages)
        return batch.weighted(rows, torch.ones_like(rows)), {}

    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        anchor = batch.ref_logprobs if self.needs_reference else batch.old_logprobs
        assert anchor is not None
        errors = squared_error(outputs.logprobs, anchor, batch.advantages, batch.mask, beta=self.spec.beta)
        return Terms(batch.weights * errors, {})
