"""One optimizer step on a weighted batch: micro-batches of whole groups, one global denominator."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dar.algorithms.base import Algorithm
from dar.batch import Weighted, joined
from dar.collective import gathered
from dar.config.run import RunSpec
from dar.errors import ConfigError, NonFiniteError
from dar.learn.adapter_ranks import AdapterRanks
from dar.learn.null_space import NullSpaceConstraint
from dar.learn.optim import build_optimizer, clipped_step
from dar.learn.selftest import require_parity
from dar.ops import Mean
from dar.policies.protocol import Policy, Wants

SAMPLER_LOGPROBS = "sampler_logprobs"
"""Name among a batch's token quantities of the log-probabilities it was sampled with."""

GAP = "rollout/logprob_gap"
"""Name among an update's means of how far the sampler's log-probabilities are from the trainer's."""


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step did, over all ranks.

    loss: Σ terms / denominator of the global batch.
    grad_norm: before clipping.
    means: the objective's own statistics, by metric name.
    logprobs: [b, T] fp32 under the weights **before** the step, of this rank's rows.
    """

    loss: float
    grad_norm: float
    means: dict[str, float]
    logprobs: Tensor


@dataclass
class Updater:
    """Runs optimizer steps on the trainable weights.

    spec: the recipe, of which optimizer, limits, correction and portions are read.
    constraint: on the weights' change, applied with each of the optimizer's steps.
    ranks: of adapters, where they shrink.
    """

    policy: Policy
    accelerator: Accelerator
    spec: RunSpec
    constraint: NullSpaceConstraint | None = None
    ranks: AdapterRanks | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.policy.share(self.spec.runtime.sharding)
        self.parameters = list(self.policy.trainable().values())
        self.optimizer = build_optimizer(self.spec.optim, self.parameters)
        sampling = self.spec.sampling
        self.correction, self.correction_cap = sampling.correction, sampling.correction_cap
        # What completions from the data were sampled with is not known, and nothing to agree with.
        self.max_gap = None if self.spec.algorithm.logged else self.spec.runtime.max_logprob_gap
        if (constraint := self.constraint) is not None:
            self.optimizer.register_step_post_hook(lambda *_: constraint.apply())

    def follow_parameters(self) -> None:
        """Trains the policy's parameters as they are now; of new ones the optimizer remembers nothing."""
        before, now = self.parameters, list(self.policy.trainable().values())
        if gone := {*before} - {*now}:
            self.policy.share(self.spec.runtime.sharding)
            self.parameters = self.optimizer.param_groups[0]["params"] = now
            for parameter in gone:
                self.optimizer.state.pop(parameter, None)

    def step(
        self,
        algorithm: Algorithm,
        batch: Weighted,
        *,
        on_policy: bool,
        is_stale: bool = False,
        where: str,
        progress: Callable[[int], None] = lambda _: None,
    ) -> UpdateResult:
        """Forward, backward and optimizer step on this rank's rows.

        Args:
            algorithm: says what the loss of some rows is.
            batch: this rank's groups of the global batch, with the global denominator.
            on_policy: the weights are still π_t's, so this pass's own log-probabilities are the old ones and every
                ratio is exactly 1; the sampler's, equal but for rounding, would make a bf16 sequence ratio noisy.
            is_stale: earlier weights sampled the batch: what the sampler said of those is nothing to agree with.
            where: for messages, such as `step 7`.
            progress: told the tokens of each finished micro-batch.

        Raises:
            NonFiniteError: the loss of some rows or the gradient is NaN or infinite, and the weights are untouched; or
                the weights are so after the step.
            RolloutError: what the sampler said of π_t is not what this pass says; the weights are untouched.
            ConfigError: nothing that is trained takes part in the loss.
        """
        with self.policy.training(compiled=self.spec.runtime.compile_layers):
            total, means, logprobs, error = self._accumulate(algorithm, batch, on_policy, where, progress)
        if on_policy and not is_stale and self.max_gap is not None and batch.weights.any():
            means[GAP] = Mean.of((logprobs - batch.old_logprobs).abs(), batch.mask)
        total, means, error = self._over_ranks(total, means, error)
        if error is not None:
            self.optimizer.zero_grad()
            raise error
        if self.max_gap is not None and GAP in means:
            require_parity(means[GAP].value, self.max_gap, where)
        grad_norm = clipped_step(self.optimizer, self.parameters, self.spec.optim.max_grad_norm, where=where)
        return UpdateResult(total, grad_norm, {name: mean.value for name, mean in means.items()}, logprobs)

    def _accumulate(
        self, algorithm: Algorithm, batch: Weighted, on_policy: bool, where: str, progress: Callable[[int], None]
    ) -> tuple[float, dict[str, Mean], Tensor, NonFiniteError | None]:
        """Adds every micro-batch's gradient; (loss, the objective's statistics, [b, T] log-probabilities, an error).

        The error waits until all passes are made, or the other ranks would wait for this one's.
        """
        total, means, parts, error = 0.0, dict[str, Mean](), [], None
        max_tokens = self.spec.runtime.max_tokens_per_microbatch
        micro_batches = [batch.select(rows) for rows in batch.groups.split(max_tokens)]
        num_own, rounds = len(micro_batches), self.policy.strategy.rounds(len(micro_batches))
        for index in range(rounds):
            micro = micro_batches[index] if index < num_own else idle(batch)
            last = index == rounds - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy.trained):
                held = algorithm.held_rows(micro)
                wants = Wants(logits=algorithm.needs_logits, held=held if held is not None and held.any() else None)
                outputs = self.policy.outputs(micro.groups, wants)
                logprobs = outputs.logprobs
                rows = micro.to(logprobs.device)
                if on_policy:
                    rows = replace(rows, old_logprobs=logprobs.detach())
                if self.correction != "none":
                    logits = None if outputs.logits is None else self._corrected(outputs.logits, rows)
                    outputs = replace(outputs, logprobs=self._corrected(logprobs, rows), logits=logits)
                terms = algorithm.terms(outputs, rows)
                loss = terms.losses.sum() / batch.denominator
                if not math.isfinite(loss.item()):
                    error = error or _non_finite(terms.losses, where)
                if not loss.requires_grad:
                    raise ConfigError(f"the loss at {where} depends on nothing that is trained: train other parameters")
                # DDP averages gradients over ranks; the denominator is already that of the global batch.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            if index >= num_own:
                continue
            total += loss.item()
            # A row of weight 0 is here only so that every rank takes part, and has nothing to report.
            for name, mean in terms.means.items() if micro.weights.any() else ():
                means[name] = means.get(name, Mean()) + mean
            parts.append(logprobs.detach().cpu())
            progress(int(micro.mask.sum()))
        return total, means, joined(parts), error

    def _corrected(self, outputs: Tensor, rows: Weighted) -> Tensor:
        """The same [B, T] values, their gradients scaled by min(π_t(trainer)/π_t(sampler), cap).

        A row that was sampled by no engine of this run (replayed from before) has no such factor.
        """
        sampler = rows.tokens.get(SAMPLER_LOGPROBS)
        if sampler is None:
            return outputs
        gap = (rows.old_logprobs - sampler).masked_fill(~rows.mask, 0.0)
        if self.correction == "sequence":
            gap = gap.sum(1, keepdim=True)
        factor = gap.exp().clamp(max=self.correction_cap)
        return outputs.detach() + factor * (outputs - outputs.detach())

    def _over_ranks(
        self, total: float, means: dict[str, Mean], error: NonFiniteError | None
    ) -> tuple[float, dict[str, Mean], NonFiniteError | None]:
        """The sums of all ranks, and the first error."""
        parts = gathered((total, means, error))
        # A rank whose rows had nothing to report (no pair, say) leaves some names out.
        names = dict.fromkeys(name for _, part, _ in parts for name in part)
        summed = {name: sum((part.get(name, Mean()) for _, part, _ in parts), Mean()) for name in names}
        return math.fsum(part for part, _, _ in parts), summed, next((each for *_, each in parts if each), None)


def idle(batch: Weighted) -> Weighted:
    """A row at weight 0, which moves and reports nothing: with it a rank takes part in a pass of the others."""
    row = batch.select(torch.arange(batch.groups.num_rows) == 0)
    return replace(row, weights=torch.zeros_like(row.weights))


def _non_finite(losses: Tensor, where: str) -> NonFiniteError:
    rows = (~losses.isfinite()).nonzero().flatten().tolist()
    return NonFiniteError(
        f"the loss is not finite at {where}, in rows {rows[:8]} of a micro-batch; the weights were not changed. Try "
        "a lower optim.learning_rate, runtime.precision=fp32, or continue from an earlier checkpoint."
    )
