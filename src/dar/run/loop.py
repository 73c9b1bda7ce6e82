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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from dar.algorithms.base import Algorithm, Metrics
from dar.batch import Rollouts, Weighted
from dar.collective import failing_together, from_main
from dar.config.run import RunSpec
from dar.learn.checkpoint import TrainState
from dar.learn.learner import Learner
from dar.learn.ranks import gather_scored, leave_ranks, own_groups
from dar.learn.selftest import check_start
from dar.learn.update import SAMPLER_LOGPROBS
from dar.record.alerts import Alert
from dar.record.environment import peak_memory_gb, release_freed_memory
from dar.record.folder import RunFolder
from dar.record.measures import evaluations
from dar.record.metrics import sample_metrics
from dar.rewards import RewardTable
from dar.rewards.combine import Reporting
from dar.rollout.protocol import Engine
from dar.run.ahead import Ahead
from dar.run.best import BestPolicy
from dar.run.collect import Collector, Kept
from dar.run.display import Display
from dar.run.heldout import HeldoutCompletions, HeldoutEvaluation
from dar.run.recorder import Recorder
from dar.run.steps import Steps, due
from dar.run.trainer_callbacks import TrainerCallbacks

log = logging.getLogger(__name__)


class Preparation(Kept, Protocol):
    """What is measured once, on the initial policy, and kept in checkpoints."""

    def run(self) -> None:
        """Measures it. Raises DarError."""
        ...


@dataclass
class Loop(Steps):
    """One run: everything it needs, built by `dar.assembly`."""

    spec: RunSpec
    learner: Learner
    engine: Engine
    collector: Collector
    ahead: Ahead
    heldout: HeldoutEvaluation | None
    known: HeldoutCompletions | None
    retention: Callable[[], Metrics] | None
    accelerator: Accelerator
    folder: RunFolder
    display: Display
    start: Callable[[bool], None]
    recorder: Recorder
    best: BestPolicy
    calibration: Preparation
    num_tokens: int = 0
    _timings: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.control = self.recorder.control
        if self.is_main:  # as are all callbacks
            theirs = (each for each in self.recorder.callbacks if isinstance(each, TrainerCallbacks))
            self.trainer_callbacks = next(theirs, None)
        self.num_steps = self.spec.steps
        self.optimizer = self.learner.updater.optimizer
        self.initial = self.learner.policy.reference_fingerprint

    @property
    def algorithm(self) -> Algorithm:
        """The method."""
        return self.learner.algorithm

    @property
    def stopped_by(self) -> Alert | None:
        """The alert that stopped the run, if one did (known to the main process)."""
        return self.recorder.watch.stopped_by

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.learner.policy.trainable()

    def begin(self) -> None:
        check_start(self.learner.policy, self.engine, self.collector.stream.at(0)[0], self.spec)
        self.calibration.run()

    def advance(self, step: int) -> None:
        metrics = self.step(step)
        with failing_together():
            self.recorder.step(step, metrics)

    def evaluation_due(self, step: int) -> bool:
        return step in (0, self.spec.steps) or due(step, self.spec.evaluation.every)

    def step(self, step: int) -> Metrics:
        """One step of the algorithm: sample, score, weigh, update."""
        started = time.perf_counter()
        self._timings.clear()
        spec = self.spec
        first, stop = own_groups(spec.prompts_per_step)
        # The passes between are all ranks', so that none may begin them where another has met an error.
        with failing_together():
            rollouts, pending = self.collector.collect(step, first, stop, phase=self._phase)
        try:
            ref_logprobs, values = self.learner.frozen_passes(rollouts.groups, self._phase)
        except BaseException:
            pending.cancel()
            raise
        with failing_together():
            scored = rollouts, pending.finish(), ref_logprobs, values
        with self._phase("diagnostics"):
            probe = self.learner.probe(rollouts.groups)
        rollouts, rewards, ref_logprobs, values = gather_scored(scored)
        of_prompts = self.algorithm.labels(rollouts.prompts).items()
        labels = rewards.parts | {name: each.unsqueeze(1).expand_as(rewards.total) for name, each in of_prompts}
        batch = rollouts.scored(rewards.total, labels, ref_logprobs=ref_logprobs, values=values)
        weighted, weight_metrics = self.algorithm.weigh(batch.rewarded() if spec.algorithm.needs_rewards else batch)
        weighted = self._adjusted(weighted)
        metrics = self._batch_metrics(step, rollouts, rewards, ref_logprobs) | weight_metrics
        metrics |= self.ahead.metrics(step, rollouts)
        is_stale = metrics.get("rollout/staleness", 0) > 0
        with self._phase("update"):
            metrics |= self.learner.learn(step, weighted, is_stale=is_stale)
        with self._phase("diagnostics"):
            metrics |= self.learner.moved(probe)
        self.learner.sync_reference(step)
        if due(step, spec.logging.completions_every):
            with failing_together():
                self.recorder.completions(step, rollouts, rewards, ref_logprobs, weighted)
        self.num_tokens = int(metrics["num_tokens"])
        if isinstance(self.engine, Reporting):
            metrics |= {f"cluster/{name}": value for name, value in self.engine.metrics().items()}
        # Taken last, so that the parts and the rest add up to the whole.
        metrics["step_time"] = time.perf_counter() - started
        return metrics | {f"time/{phase}": seconds for phase, seconds in self._timings.items()}

    def _adjusted(self, weighted: Weighted) -> Weighted:
        """The batch with what the recipe's sampling settings add to any method."""
        sampling = self.spec.sampling
        if sampling.mask_truncated:
            weighted = replace(weighted, weights=weighted.weights * weighted.has_eos)
        if sampling.correction != "none":
            weighted = replace(weighted, tokens={**weighted.tokens, SAMPLER_LOGPROBS: weighted.old_logprobs})
        return weighted

    def _batch_metrics(
        self, step: int, rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None
    ) -> Metrics:
        groups = rollouts.groups
        metrics: Metrics = {
            "epoch": self.collector.stream.epoch(step),
            "num_tokens": self.num_tokens + rollouts.num_tokens + rewards.reported.get("rollout/discarded_tokens", 0),
            "tokens/prompt": sum(map(len, groups.prompt_ids)),
            "tokens/completion": int(groups.mask.sum()),
            "memory/peak_gb": peak_memory_gb(),
        }
        return metrics if self.spec.algorithm.logged else metrics | sample_metrics(rollouts, rewards, ref_logprobs)

    def end(self) -> None:
        """Closes the engine and finishes the trackers; the loop takes no step after this."""
        self.ahead.cancel()
        self.engine.close()
        self.learner.release()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        atexit.register(leave_ranks)

    def evaluate(self, step: int) -> None:
        if self.heldout is None and self.known is None and self.retention is None:
            return
        with self._phase("heldout"):
            found = {} if self.known is None else self.known.run()
            found |= {} if self.retention is None else self.retention()
            result = None if self.heldout is None else self.heldout.run(step, progress=self.display.tokens)
        found |= {} if result is None else result.metrics
        # Before its line is written: a run that is killed in between evaluates again, and finds the best as it is.
        if self.best.consider(step, {f"eval/{name}": value for name, value in found.items()}):
            self.display.note(f"the best policy so far is in {self.folder.best}")
        with failing_together():
            self.recorder.heldout(step, found, result, seconds=self._timings.pop("heldout"))
        if self.heldout is not None and self.spec.model.library == "transformers":
            entropy = from_main(lambda: evaluations(self.folder.metrics())[0].get("entropy"))
            to_read = self.heldout.to_read(entropy)
            from_main(lambda: self.folder.write_completions(f"to-read-step-{step}", to_read))
        # An evaluation's batch is larger than a step's: what it used is not to stand beside the update's peak.
        release_freed_memory()

    def state(self, step: int) -> TrainState:
        return TrainState(
            step,
            self.num_tokens,
            self.initial,
            algorithm=self.algorithm.state(),
            rewards=self.collector.state(),
            calibration=self.calibration.state(),
            adapter={} if (ranks := self.learner.updater.ranks) is None else ranks.state(),
            replaced=self.collector.stream.first(step) - step * self.spec.prompts_per_step,
        )

    def reshape(self, state: TrainState) -> None:
        if (ranks := self.learner.updater.ranks) is not None:
            ranks.restore(state.adapter)
            self.learner.updater.follow_parameters()

    def extras(self) -> dict[str, Tensor]:
        return self.learner.extras() | self.ahead.state(self._done)

    def restore(self, state: TrainState, extras: Mapping[str, Tensor]) -> None:
        if self.engine.reproduces == "nothing":
            log.warning("the engine reproduces nothing: the run goes on otherwise than one that was never stopped")
        self.num_tokens = state.num_tokens
        self.algorithm.restore(state.algorithm)
        self.collector.restore(state.rewards)
        self.collector.stream.replaced = {state.step - 1: state.replaced}
        self.calibration.restore(state.calibration)
        self.learner.restore(extras)
        self.ahead.restore(state.step, extras, self.collector.stream)
        if self.is_main:
            rows = [row for row in self.folder.metrics() if row["step"] <= state.step]
            self.recorder.watch.restore(rows)
            if self.trainer_callbacks is not None:
                self.trainer_callbacks.restore(rows)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.display.phase(name)
        started = time.perf_counter()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.perf_counter() - started
