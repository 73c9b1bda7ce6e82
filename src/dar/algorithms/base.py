"""What the trainer asks of an algorithm, and what the bundles share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dar.batch import Batch, Prompt, TokenOutputs, Weighted
from dar.config.base import Spec
from dar.ops import Mean, kl_k1, kl_k3, masked_sum

Metrics = dict[str, float]


@dataclass(frozen=True)
class Terms:
    """The loss of some rows, unreduced, and what is worth logging about them.

    losses: [B] per row, to be summed and divided by the global denominator.
    means: parts of means over rows or tokens, added up over micro-batches and ranks.
    """

    losses: Tensor
    means: dict[str, Mean]


class Algorithm(ABC):
    """What the trainer asks of a method.

    Spec: the settings of a method of your own, which is made from a value of it (docs/algorithms.md).
    updates: optimizer steps per batch of rollouts.
    needs_reference: log-probabilities under π₀ are read; False skips that pass.
    needs_values: a critic is trained along, and its values of the batch are read.
    needs_logits: `terms` reads the sampled tokens' logits.
    needs_probabilities: a token's probability is read, not ratios alone; continuous steps have only densities.
    needs_ratios: `begin_update` reads log π_θ of the whole batch, which costs a forward pass from the second update on.
    reads_rows_together: a row's loss depends on others'.
    replay: earlier batches that are trained on again after each new one.
    """

    Spec: ClassVar[type[Spec]] = Spec
    updates: int = 1
    needs_reference: bool = False
    needs_values: bool = False
    needs_logits: bool = False
    needs_probabilities: bool = False
    needs_ratios: bool = False
    reads_rows_together: bool = False
    replay: int = 0

    @abstractmethod
    def weigh(self, batch: Batch) -> tuple[Weighted, Metrics]:
        """Fixes advantages, weights and denominator from the global batch; no gradient."""

    @abstractmethod
    def terms(self, outputs: TokenOutputs, batch: Weighted) -> Terms:
        """The loss of each row of a micro-batch."""

    def labels(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """[P] numbers by name that the method reads of its prompts' rows: `weigh` has them among the batch's labels."""
        return {}

    def loads(self, batch: Weighted) -> Tensor | None:
        """[B, T] ≥ 0: how long each token's part of the gradient in the logits is, or None where that is not known.

            |∂ Σ losses / ∂ log π_θ(y_t)| · (1 − π_t(y_t))   at π_θ = π_t

        ∇ log π(y) in the logits is e_y − π, of length 1 − π(y) to √2 times that. Not known are the loads of rows read
        together, beside a critic's loss, of the data's completions (π_t is NaN), and of later updates, where clips have
        closed and penalties woken: there only rows of weight 0 may be left out.
        """
        is_later = self.updates + self.replay > 1
        if self.reads_rows_together or self.needs_values or is_later or batch.old_logprobs[batch.mask].isnan().any():
            return None
        logprobs, logits = (batch.old_logprobs.clone().requires_grad_() for _ in range(2))
        losses = self.terms(TokenOutputs(logprobs, logits=logits), batch).losses
        slopes = torch.autograd.grad(losses.sum(), (logprobs, logits), allow_unused=True, materialize_grads=True)
        # A logit's own gradient has length 1.
        parts = slopes[0].abs() * -batch.old_logprobs.expm1() + slopes[1].abs()
        return parts.masked_fill(~batch.mask, 0.0)

    def held_rows(self, batch: Weighted) -> Tensor | None:
        """[B] bool: rows for which `terms` reads KL(π₀‖π_θ) of whole distributions; None for a method without any.

        With them the module's outputs have `ref_kl`, which costs these rows another pass of π₀ at every update.
        """
        return None

    def begin_update(self, tokens: UpdateTokens) -> Metrics:
        """Called before each optimizer step of a method with `needs_ratios`, with every token of the global batch."""
        return {}

    def finish_update(self, means: Metrics) -> Metrics:
        """Called after each optimizer step with the means its terms reported."""
        return {}

    def state(self) -> dict[str, float]:
        """Numbers that change from step to step and belong into a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes back what `state` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but was given {', '.join(state)}")


@dataclass(frozen=True)
class UpdateTokens:
    """Every sampled token of the global batch as the policy sees it before an optimizer step.

    log_ratios: [N] log π_θ − log π_t.
    advantages: [N].
    old_logprobs: [N].
    """

    log_ratios: Tensor
    advantages: Tensor
    old_logprobs: Tensor


def require_reference(algorithm: Algorithm, batch: Batch) -> None:
    """Raises ValueError where the method reads π₀ and the batch has none: its KL would silently be 0."""
    if algorithm.needs_reference and batch.ref_logprobs is None:
        raise ValueError(f"{type(algorithm).__name__} reads the reference, but the batch has no ref_logprobs")


def kl_metrics(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, *, name: str) -> Metrics:
    """KL(p‖q) from samples of p: k1 and k3, per completion (summed over tokens) and per token.

    Args:
        logprobs, other_logprobs: [B, T] nats under p and q.
        mask: [B, T] bool.
        name: `ref` or `old`. TRL's `kl` is `kl/<name>_k3_per_token`.
    """
    estimators: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"": kl_k1, "_k3": kl_k3}
    metrics: Metrics = {}
    for suffix, estimator in estimators.items():
        per_row = masked_sum(estimator(logprobs.float(), other_logprobs.float()), mask)
        metrics[f"kl/{name}{suffix}"] = float(per_row.mean())
        metrics[f"kl/{name}{suffix}_per_token"] = float(per_row.sum() / mask.sum())
    return metrics
