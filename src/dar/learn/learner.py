"""What is learned from one weighted batch: the optimizer steps on it, and on earlier batches that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dar.algorithms.base import Algorithm, Metrics, UpdateTokens
from dar.batch import Weighted
from dar.config.run import RunSpec
from dar.learn.optim import learning_rate_factor, set_learning_rate
from dar.learn.ranks import own_groups
from dar.learn.replay import ReplayBuffer
from dar.learn.update import Updater
from dar.policies.text.policy import Policy


@dataclass
class Learner:
    """Takes a method's optimizer steps on the global batch, of which this rank trains on its own groups.

    replay: earlier batches, for methods that train on them again.
    """

    spec: RunSpec
    algorithm: Algorithm
    policy: Policy
    updater: Updater
    accelerator: Accelerator
    progress: Callable[[int], None]
    replay: ReplayBuffer = field(init=False)

    def __post_init__(self) -> None:
        self.replay = ReplayBuffer(self.algorithm.replay)

    def learn(self, step: int, weighted: Weighted) -> Metrics:
        """All updates of a step; rows of no weight, or of next to none, are left out.

        Raises:
            NonFiniteError: a loss or the gradient is NaN or infinite, and the weights are as after the last update; or
                the weights are so.
            RolloutError: the trainer's log-probabilities are not the sampler's; the weights are untouched.
        """
        where = f"step {step}"
        # A correction scales tokens' gradients by factors that only the trainer's pass will know.
        loads = self.algorithm.loads(weighted) if self.spec.sampling.correction == "none" else None
        carrying = weighted.carries_weight(loads, self.spec.runtime.negligible_share)
        # Of all that the batch had, those without a reward among them.
        num_rows = weighted.rewards.numel()
        metrics: Metrics = {"rows/skipped_fraction": float((num_rows - carrying.sum()) / num_rows)}
        metrics |= self._update(step, self._own_rows(weighted, carrying), where)
        for earlier in self.replay.batches:
            metrics |= self._replayed(earlier, where)
        self.replay.add(weighted)
        return metrics

    def _update(self, step: int, own: Weighted, where: str) -> Metrics:
        updates, optim = self.algorithm.updates, self.spec.optim
        losses, norms, rate, means = [], [], 0.0, dict[str, float]()
        for update in range(updates):
            factor = learning_rate_factor(
                (step - 1) * updates + update,
                schedule=optim.schedule,
                warmup_steps=optim.warmup_steps,
                total_steps=self.spec.steps * updates,
            )
            rate = optim.learning_rate * factor
            set_learning_rate(self.updater.optimizer, rate)
            begun = self._begun(own, is_first=update == 0)
            # The first forward pass is of π_t itself.
            result = self.updater.step(self.algorithm, own, on_policy=update == 0, where=where, progress=self.progress)
            if update == 0:
                own = replace(own, old_logprobs=result.logprobs)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            means |= begun | result.means | self.algorithm.finish_update(result.means)
        return {"loss": sum(losses) / updates, "grad_norm": sum(norms) / updates, "learning_rate": rate, **means}

    def _replayed(self, earlier: Weighted, where: str) -> Metrics:
        """One more update on a batch of an earlier step, its old log-probabilities those of its own time."""
        own = self._own_rows(earlier, earlier.weights != 0)
        result = self.updater.step(
            self.algorithm, own, on_policy=False, where=f"{where}, replay", progress=self.progress
        )
        means = result.means | self.algorithm.finish_update(result.means)
        return {"loss/replay": result.loss} | {f"replay/{name}": value for name, value in means.items()}

    def _begun(self, own: Weighted, *, is_first: bool) -> Metrics:
        """Tells a method that asks for it how far the policy has come from π_t on every token of the batch."""
        if not self.algorithm.needs_ratios:
            return {}
        current = (
            own.old_logprobs
            if is_first
            else self.policy.logprobs(own.groups, max_tokens=self.spec.runtime.max_tokens_per_microbatch)
        )
        mask = own.mask & (own.weights != 0).unsqueeze(1)
        parts = (
            (current - own.old_logprobs)[mask],
            own.advantages.unsqueeze(1).expand_as(mask)[mask],
            own.old_logprobs[mask],
        )
        gathered = gather_object([parts]) if self.accelerator.num_processes > 1 else [parts]
        return self.algorithm.begin_update(UpdateTokens(*(torch.cat(column) for column in zip(*gathered))))

    def _own_rows(self, batch: Weighted, carrying: Tensor) -> Weighted:
        """This rank's rows that carry weight; where none does, its first at weight 0, so that every rank takes part."""
        num_prompts, num_generations = batch.rewards.shape
        first, stop = own_groups(num_prompts, self.accelerator)
        own = (batch.places >= first * num_generations) & (batch.places < stop * num_generations)
        chosen = own & carrying
        if chosen.any():
            return batch.select(chosen)
        chosen[own.int().argmax()] = True
        row = batch.select(chosen)
        return replace(row, weights=torch.zeros_like(row.weights))
