"""The training loop. `Loop.step` reads like the paper's algorithm box; everything around it is bookkeeping.

for each step:
    sample K completions of each prompt from π_t and score them (or read them from the data)
    compute log π₀, and a critic's values
    fix advantages and weights on the global batch
    take optimizer steps on the weighted loss; the result is π_t+1
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dar.algorithms.base import Algorithm, Metrics, kl_metrics
from dar.batch import Rollouts, TokenGroups, Weighted
from dar.config.run import RunSpec
from dar.errors import CheckpointError, DarError
from dar.learn.checkpoint import TrainState, load_checkpoint, newest_valid, read_extras, read_state, save_checkpoint
from dar.learn.learner import Learner
from dar.learn.ranks import failing_together, gather_scored, own_groups
from dar.learn.selftest import check_start
from dar.learn.update import SAMPLER_LOGPROBS, Updater
from dar.policies.text.policy import Policy
from dar.rewards import RewardTable
from dar.rollout.in_process.engine import Engine
from dar.run.alerts import Alert
from dar.run.best import BestPolicy
from dar.run.collect import Collector
from dar.run.display import Display
from dar.run.environment import peak_memory_gb, release_freed_memory
from dar.run.folder import RunFolder
from dar.run.heldout import HeldoutEvaluation
from dar.run.metrics import sample_metrics
from dar.run.recorder import Recorder
from dar.run.stopping import signals_handled

log = logging.getLogger(__name__)


class Preparation(Protocol):
    """What is measured once, on the initial policy, and kept in checkpoints."""

    def run(self) -> None:
        """Measures it. Raises DarError."""
        ...

    def state(self) -> dict[str, float]:
        """What was measured, for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes back what `state` gave. Raises CheckpointError where it was not measured."""
        ...


@dataclass
class Loop:
    """One run: everything it needs, built by `dar.assembly`."""

    spec: RunSpec
    policy: Policy
    engine: Engine
    collector: Collector
    algorithm: Algorithm
    heldout: HeldoutEvaluation | None
    updater: Updater
    accelerator: Accelerator
    folder: RunFolder
    display: Display
    recorder: Recorder
    best: BestPolicy
    calibration: Preparation
    num_tokens: int = 0
    learner: Learner = field(init=False)
    _done: int = field(default=0, init=False)
    _is_whole: bool = field(default=True, init=False)
    _stop_asked: bool = field(default=False, init=False)
    _timings: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.learner = Learner(
            self.spec, self.algorithm, self.policy, self.updater, self.accelerator, self.display.tokens
        )
        self.updater.optimizer.register_step_pre_hook(self._begin_change)

    def run(self, *, resume: bool) -> int:
        """Trains to the last step.

        Args:
            resume: continue from the newest valid checkpoint of the run folder.

        Returns:
            The number of completed steps: `spec.steps`, or fewer after Ctrl-C, SIGTERM or an alert that stops the run
            (`stopped_by`); a checkpoint is then saved, unless no step was taken.

        Raises:
            DarError: whatever went wrong, in words; nothing already saved is lost.
        """
        done = self._restore() if resume else 0
        if done == 0:
            check_start(self.policy, self.engine, self.collector.stream.at(0)[0], self.spec)
            self.calibration.run()
        self._done = done
        with self.display.live(done), signals_handled(self._ask_to_stop):
            try:
                self._train()
            except DarError:
                if self._done > 0 and self._is_whole and self.accelerator.is_main_process:
                    self._write_checkpoint(self._done)
                    self.display.note(f"saved after step {self._done}; continue with --resume")
                raise
        return self._done

    def _train(self) -> None:
        # Step 0, or a step whose evaluation an earlier run could not finish.
        if self._evaluation_due(self._done) and not self.folder.is_evaluated(self._done):
            self._evaluate(self._done)
        stopping = self._is_stopping()
        while self._done < self.spec.steps and not stopping:
            step = self._done + 1
            metrics = self.step(step)
            self.recorder.step(step, metrics)
            self._done, self._is_whole = step, True
            if self._evaluation_due(step):
                self._evaluate(step)
            stopping = self._is_stopping()
            if step == self.spec.steps or stopping or _due(step, self.spec.checkpoint.every):
                self._save(step)

    def _evaluation_due(self, step: int) -> bool:
        return step in (0, self.spec.steps) or _due(step, self.spec.evaluation.every)

    @property
    def stopped_by(self) -> Alert | None:
        """The alert that stopped the run, if one did (known to the main process)."""
        return self.recorder.watch.stopped_by

    def _is_stopping(self) -> bool:
        """A signal or an alert asks for the end. Ranks agree: held-out lines are seen by the main process alone."""
        asked = self._stop_asked or self.stopped_by is not None
        return any(gather_object([asked])) if self.accelerator.num_processes > 1 else asked

    def step(self, step: int) -> Metrics:
        """One step of the algorithm: sample, score, weigh, update."""
        started = time.perf_counter()
        self._timings.clear()
        spec = self.spec
        first, stop = own_groups(spec.prompts_per_step, self.accelerator)
        with failing_together(self.accelerator):
            rollouts, pending = self.collector.collect(step, first, stop, phase=self._phase)
            try:
                ref_logprobs, values = self._frozen_passes(rollouts.groups)
            except BaseException:
                pending.cancel()
                raise
            scored = rollouts, pending.finish(), ref_logprobs, values
        probe = self._old_kl_probe(rollouts.groups)
        rollouts, rewards, ref_logprobs, values = gather_scored(self.accelerator, scored)
        batch = rollouts.scored(rewards.total, rewards.parts, ref_logprobs=ref_logprobs, values=values)
        weighted, weight_metrics = self.algorithm.weigh(batch.rewarded())
        weighted = self._adjusted(weighted)
        metrics = self._batch_metrics(step, rollouts, rewards, ref_logprobs) | weight_metrics
        with self._phase("update"):
            metrics |= self.learner.learn(step, weighted)
        with self._phase("diagnostics"):
            metrics |= self._old_kl(probe)
        if spec.reference_sync is not None and _due(step, spec.reference_sync.every):
            self.policy.sync_reference(spec.reference_sync.mix)
        if _due(step, spec.logging.completions_every):
            self.recorder.completions(step, rollouts, rewards, ref_logprobs, weighted)
        self.num_tokens = int(metrics["num_tokens"])
        # Taken last, so that the parts and the rest add up to the whole.
        metrics["step_time"] = time.perf_counter() - started
        return metrics | {f"time/{phase}": seconds for phase, seconds in self._timings.items()}

    def _frozen_passes(self, groups: TokenGroups) -> tuple[Tensor | None, Tensor | None]:
        """log π₀ and the critic's values of the sampled tokens, each where the method reads it."""
        ref_logprobs = values = None
        if self.algorithm.needs_reference:
            with self._phase("reference"):
                ref_logprobs = self.policy.ref_logprobs(groups, max_tokens=self._max_tokens)
        if self.algorithm.needs_values:
            with self._phase("critic"):
                values = self.policy.values(groups, max_tokens=self._max_tokens)
        return ref_logprobs, values

    @property
    def _max_tokens(self) -> int:
        return self.spec.runtime.max_tokens_per_microbatch

    def _adjusted(self, weighted: Weighted) -> Weighted:
        """The batch with what the recipe's sampling settings add to any method."""
        sampling = self.spec.sampling
        if sampling.mask_truncated:
            weighted = replace(weighted, weights=weighted.weights * weighted.has_eos)
        if sampling.correction != "none":
            weighted = replace(weighted, tokens={**weighted.tokens, SAMPLER_LOGPROBS: weighted.old_logprobs})
        return weighted

    def _old_kl_probe(self, groups: TokenGroups) -> tuple[TokenGroups, Tensor] | None:
        """The completions of a few prompts and their log-probabilities under π_t, from the trainer's own pass.

        All completions of a prompt, whatever their weight. They are among those the update learns from, so k1 tells how
        far *these* were pulled and can be negative; k3 is the one to read as a distance.
        """
        count = min(self.spec.logging.old_kl_prompts, len(groups.group_sizes))
        if count == 0:
            return None
        some = groups.select(groups.rows_of(0, count))
        with self._phase("diagnostics"):
            return some, self.policy.logprobs(some, max_tokens=self._max_tokens)

    def _old_kl(self, probe: tuple[TokenGroups, Tensor] | None) -> Metrics:
        """KL(π_t‖π_t+1) on the probe."""
        if probe is None:
            return {}
        groups, before = probe
        return kl_metrics(before, self.policy.logprobs(groups, max_tokens=self._max_tokens), groups.mask, name="old")

    def _batch_metrics(
        self, step: int, rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None
    ) -> Metrics:
        groups = rollouts.groups
        prompt_tokens = sum(len(prompt) for prompt in groups.prompt_ids)
        metrics: Metrics = {
            "epoch": self.collector.stream.epoch(step),
            "num_tokens": self.num_tokens + prompt_tokens * rollouts.num_generations + int(groups.lengths.sum()),
            "tokens/prompt": prompt_tokens,
            "tokens/completion": int(groups.mask.sum()),
            "memory/peak_gb": peak_memory_gb(),
        }
        return metrics if self.spec.algorithm.logged else metrics | sample_metrics(rollouts, rewards, ref_logprobs)

    def end(self) -> None:
        """Finishes the trackers; the loop takes no step after this."""
        # DDP's wrapper has to go before the process group. Were it the group's last owner, freeing it later would wait
        # for gloo's threads with the interpreter's lock held, for which one of them may be waiting: a deadlock. The
        # group frees itself without the lock; not yet, because another run of this process could not make a second one.
        self.updater.module = self.accelerator.unwrap_model(self.updater.module)
        self.accelerator.free_memory()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        atexit.register(self.accelerator.state.destroy_process_group)

    def _evaluate(self, step: int) -> None:
        if self.heldout is None or not self.accelerator.is_main_process:
            return
        with self._phase("heldout"):
            result = self.heldout.run(where=f"the held-out evaluation at step {step}", progress=self.display.tokens)
        # Before its line is written: a run that is killed in between evaluates again, and finds the best as it is.
        if self.best.consider(step, result.line):
            self.display.note(f"the best policy so far is in {self.folder.best}")
        self.recorder.heldout(step, result, seconds=self._timings.pop("heldout"))
        # An evaluation's batch is larger than a step's: what it used is not to stand beside the update's peak.
        release_freed_memory()

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self._write_checkpoint(step)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, step: int) -> None:
        state = TrainState(
            step,
            self.num_tokens,
            self.policy.reference_fingerprint,
            algorithm=self.algorithm.state(),
            rewards=self.collector.state(),
            calibration=self.calibration.state(),
        )
        save_checkpoint(
            self.folder.checkpoints,
            state,
            self.policy.trainable(),
            self.updater.optimizer,
            self._extras(),
            keep=self.spec.checkpoint.keep,
        )

    def _restore(self) -> int:
        checkpoint = newest_valid(self.folder.checkpoints)
        if checkpoint is None:
            log.warning("%s has no checkpoint yet; starting from the beginning", self.folder.path)
            if self.accelerator.is_main_process:
                self.folder.record_recipe(self.spec)
                self.folder.forget_after(-1)
            return 0
        reference = read_state(checkpoint).reference
        if reference != self.policy.reference_fingerprint:
            raise CheckpointError(
                f"{checkpoint} was trained from another initial model: π₀'s weights differ (saved {reference[:12]}, "
                f"here {self.policy.reference_fingerprint[:12]}). Resume with the model the run was started from."
            )
        state = load_checkpoint(checkpoint, self.policy.trainable(), self.updater.optimizer)
        self.num_tokens = state.num_tokens
        self.algorithm.restore(state.algorithm)
        self.collector.restore(state.rewards)
        self.calibration.restore(state.calibration)
        self._restore_extras(read_extras(checkpoint))
        if self.accelerator.is_main_process:
            self.folder.record_recipe(self.spec)
            self.folder.forget_after(state.step)
            self.recorder.watch.restore(self.folder.metrics())
        self.display.note(f"continuing after step {state.step} ({checkpoint})")
        return state.step

    def _extras(self) -> dict[str, Tensor]:
        """Tensors that change from step to step beside the weights, by name."""
        found = {f"replay.{name}": tensor for name, tensor in self.learner.replay.state().items()}
        if self.spec.reference_sync is not None:
            found |= {f"reference.{name}": tensor for name, tensor in self.policy.reference_state().items()}
        if self.updater.constraint is not None:
            found |= {f"null_space.{name}": tensor for name, tensor in self.updater.constraint.state_dict().items()}
        return found

    def _restore_extras(self, extras: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in extras.items() if name.startswith(prefix)}

        self.learner.replay.restore(part("replay."))
        if self.spec.reference_sync is not None:
            self.policy.restore_reference(part("reference."))
        if self.updater.constraint is not None:
            self.updater.constraint.load_state_dict(part("null_space."))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.display.phase(name)
        started = time.perf_counter()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.perf_counter() - started

    def _begin_change(self, *_: object) -> None:
        """The optimizer steps: until this step is finished, what is in memory is none that could be continued from."""
        self._is_whole = False

    def _ask_to_stop(self, name: str) -> None:
        """A signal came: this step is finished first."""
        self._stop_asked = True
        self.display.note(f"{name}: finishing this step, then saving (again to stop at once)")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
