"""What is learned from one weighted batch: the optimizer steps on it, and on earlier batches that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dar.algorithms.base import Algorithm, Metrics, UpdateTokens, kl_metrics
from dar.batch import TokenGroups, Weighted, joined
from dar.collective import gathered
from dar.learn.optim import set_learning_rate
from dar.learn.ranks import own_groups
from dar.learn.replay import ReplayBuffer
from dar.learn.update import Updater, idle
from dar.ops import effective_sample_size, masked_sum

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a named part of the step."""


@dataclass
class Learner:
    """Holds what is learned from batches: the policy, and all that changes with it.

    Takes a method's optimizer steps on the global batch, of which this rank trains on its own groups.

    replay: earlier batches, for methods that train on them again.
    """

    updater: Updater
    algorithm: Algorithm
    progress: Callable[[int], None]
    replay: ReplayBuffer = field(init=False)

    def __post_init__(self) -> None:
        self.replay = ReplayBuffer(self.algorithm.replay)
        self.spec, self.policy, self.accelerator = self.updater.spec, self.updater.policy, self.updater.accelerator
        self._max_tokens = self.spec.runtime.max_tokens_per_microbatch

    def frozen_passes(self, groups: TokenGroups, phase: Phase) -> tuple[Tensor | None, Tensor | None]:
        """log π₀ and the critic's values of the sampled tokens, each where the method reads it."""
        ref_logprobs = values = None
        if self.algorithm.needs_reference:
            with phase("reference"):
                ref_logprobs = self.policy.ref_logprobs(groups, max_tokens=self._max_tokens)
        if self.algorithm.needs_values:
            with phase("critic"):
                values = self.policy.values(groups, max_tokens=self._max_tokens)
        return ref_logprobs, values

    def probe(self, groups: TokenGroups) -> tuple[TokenGroups, Tensor] | None:
        """The completions of a few prompts and their log-probabilities under π_t, from the trainer's own pass.

        All completions of a prompt, whatever their weight. They are among those the update learns from, so k1 tells how
        far *these* were pulled and can be negative; k3 is the one to read as a distance.
        """
        count = min(self.spec.logging.old_kl_prompts, len(groups.group_sizes))
        if count == 0:
            return None
        some = groups.select(groups.rows_of(0, count))
        return some, self.policy.logprobs(some, max_tokens=self._max_tokens)

    def moved(self, probe: tuple[TokenGroups, Tensor] | None) -> Metrics:
        """KL(π_t‖π_t+1) on the probe."""
        if probe is None:
            return {}
        groups, before = probe
        return kl_metrics(before, self.policy.logprobs(groups, max_tokens=self._max_tokens), groups.mask, name="old")

    def sync_reference(self, step: int) -> None:
        """Lets π₀ follow the policy, where that is due."""
        sync = self.spec.reference_sync
        if sync is not None and step % sync.every == 0:
            self.policy.sync_reference(sync.mix)

    def extras(self) -> dict[str, Tensor]:
        """Tensors that change from step to step beside the weights, by name."""
        found = {f"replay.{name}": tensor for name, tensor in self.replay.state().items()}
        if self.spec.reference_sync is not None:
            found |= {f"reference.{name}": tensor for name, tensor in self.policy.reference_state().items()}
        if self.updater.constraint is not None:
            found |= {f"null_space.{name}": tensor for name, tensor in self.updater.constraint.state_dict().items()}
        return found

    def restore(self, extras: Mapping[str, Tensor]) -> None:
        """Takes back what `extras` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in extras.items() if name.startswith(prefix)}

        self.replay.restore(part("replay."))
        if self.spec.reference_sync is not None:
            self.policy.restore_reference(part("reference."))
        if self.updater.constraint is not None:
            self.updater.constraint.load_state_dict(part("null_space."))

    def release(self) -> None:
        """Lets go of the ranks; nothing is learned after this."""
        # DDP's wrapper has to go before the process group. Were it the group's last owner, freeing it later would wait
        # for gloo's threads with the interpreter's lock held, for which one of them may be waiting: a deadlock. The
        # group frees itself without the lock; not yet, because another run of this process could not make a second one.
        self.policy.trained = getattr(self.policy.trained, "module", self.policy.trained)
        self.accelerator.free_memory()

    def learn(self, step: int, weighted: Weighted, *, is_stale: bool = False) -> Metrics:
        """All updates of a step; rows of no weight, or of next to none, are left out.

        Where earlier weights than those that learn sampled the batch, it `is_stale`: its `old_logprobs` are theirs.

        Raises:
            NonFiniteError: a loss or the gradient is NaN or infinite, and the weights are as after the last update; or
                the weights are so.
            RolloutError: the trainer's log-probabilities are not the sampler's; the weights are untouched.
        """
        where = f"step {step}"
        # A correction scales tokens' gradients by factors that only the trainer's pass will know, and so does a ratio.
        is_known = self.spec.sampling.correction == "none" and weighted.groups.is_discrete and not is_stale
        loads = self.algorithm.loads(weighted) if is_known else None
        carrying = weighted.carries_weight(loads, self.spec.runtime.negligible_share)
        # Of all that the batch had, those without a reward among them.
        num_rows = weighted.rewards.numel()
        metrics: Metrics = {"rows/skipped_fraction": float((num_rows - carrying.sum()) / num_rows)}
        metrics |= self._update(step, self._own_rows(weighted, carrying), where, is_stale=is_stale)
        for earlier in self.replay.batches:
            metrics |= self._replayed(earlier, where)
        self.replay.add(weighted)
        if self.updater.ranks is not None:
            metrics |= self.updater.ranks.after(step)
            self.updater.follow_parameters()
        return metrics

    def _update(self, step: int, own: Weighted, where: str, *, is_stale: bool) -> Metrics:
        updates = self.algorithm.updates
        # A correction stands for the distance to what sampled a stale batch; without, the ratios have to.
        is_proximal = not is_stale or self.spec.sampling.correction != "none"
        losses, norms, rate, means = [], [], 0.0, dict[str, float]()
        for update in range(updates):
            index, total = (step - 1) * updates + update, self.spec.steps * updates
            restarted = self.updater.ranks.cut_at * updates if self.updater.ranks else 0
            rate = set_learning_rate(self.updater.optimizer, self.spec.optim, index, total, restarted)
            # The first forward pass is of π_t itself.
            on_policy = update == 0 and is_proximal
            begun = self._begun(own, on_policy=on_policy)
            result = self.updater.step(
                self.algorithm, own, on_policy=on_policy, is_stale=is_stale, where=where, progress=self.progress
            )
            if update == 0 and is_stale:
                means |= self._staleness(own, result.logprobs)
            if on_policy:
                own = replace(own, old_logprobs=result.logprobs)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            means |= begun | result.means | self.algorithm.finish_update(result.means)
        return {"loss": sum(losses) / updates, "grad_norm": sum(norms) / updates, "learning_rate": rate, **means}

    def _staleness(self, own: Weighted, current: Tensor) -> Metrics:
        """KL(π_b‖π_t) on the rows that are trained on, sampled by π_b, and (Σρ)²/(N·Σρ²) of their ρ = π_t/π_b.

        Args:
            own: this rank's rows, their `old_logprobs` still log π_b.
            current: [b, T] log π_t.
        """
        rows = (own.old_logprobs, current, own.mask) if own.weights.any() else None
        if not (found := [*filter(None, gathered(rows))]):
            return {}
        behaviour, current, mask = map(joined, zip(*found))
        log_ratios = masked_sum(current - behaviour, mask)
        # The share does not depend on the ratios' scale, which may be beyond any number.
        ratios = (log_ratios - log_ratios.max()).exp()
        share = float(effective_sample_size(ratios)) / len(ratios)
        return {"rollout/ess_fraction": share, **kl_metrics(behaviour, current, mask, name="stale")}

    def _replayed(self, earlier: Weighted, where: str) -> Metrics:
        """One more update on a batch of an earlier step, its old log-probabilities those of its own time."""
        own = self._own_rows(earlier, earlier.weights != 0)
        result = self.updater.step(
            self.algorithm, own, on_policy=False, where=f"{where}, replay", progress=self.progress
        )
        means = result.means | self.algorithm.finish_update(result.means)
        return {"loss/replay": result.loss} | {f"replay/{name}": value for name, value in means.items()}

    def _begun(self, own: Weighted, *, on_policy: bool) -> Metrics:
        """Tells a method that asks for it how far the policy has come from π_t on every token of the batch."""
        if not self.algorithm.needs_ratios:
            return {}
        current = own.old_logprobs if on_policy else self.policy.logprobs(own.groups, max_tokens=self._max_tokens)
        mask = own.mask & (own.weights != 0).unsqueeze(1)
        parts = (
            (current - own.old_logprobs)[mask],
            own.advantages.unsqueeze(1).expand_as(mask)[mask],
            own.old_logprobs[mask],
        )
        return self.algorithm.begin_update(UpdateTokens(*(torch.cat(column) for column in zip(*gathered(parts)))))

    def _own_rows(self, batch: Weighted, carrying: Tensor) -> Weighted:
        """This rank's rows that carry weight; where none does, one at weight 0, so that every rank takes part."""
        num_prompts, num_generations = batch.rewards.shape
        first, stop = own_groups(num_prompts)
        own = (batch.places >= first * num_generations) & (batch.places < stop * num_generations)
        chosen = own & carrying
        return batch.select(chosen) if chosen.any() else idle(batch)
