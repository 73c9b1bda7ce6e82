"""Batches that are sampled while earlier ones are learned from, and how they are kept in a checkpoint."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait

import torch
from torch import Tensor

from dar.batch import Prompt, Rollouts, TokenGroups, joined
from dar.collective import gathered, num_ranks
from dar.config.run import RunSpec
from dar.data.prompts import PromptStream
from dar.errors import DarError, RolloutError
from dar.learn.ranks import own_groups

log = logging.getLogger(__name__)


class Ahead:
    """This rank's rollouts that are on their way, by the step that will learn from them: at most `max_staleness` + 1.

    idle: seconds for which the engine had nothing to do before it was last asked.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.lag, self.last, self.num_generations = spec.sampling.max_staleness, spec.steps, spec.num_generations
        self.batches: dict[int, Future[Rollouts]] = {}
        self.idle, self._ended = 0.0, 0.0

    def fill(self, step: int, submit: Callable[[int], Future[Rollouts]]) -> None:
        """Asks for the batches of this and the next steps that were not asked for yet, and forgets those before."""
        steps = range(step, min(step + self.lag, self.last) + 1)
        self.batches = {each: batch for each, batch in self.batches.items() if each in steps}
        is_idle = bool(self._ended) and all(batch.done() for batch in self.batches.values())
        self.idle = time.perf_counter() - self._ended if is_idle else 0.0
        for each in steps:
            if each not in self.batches:
                self.batches[each] = submit(each)
                self.batches[each].add_done_callback(self._note_end)

    def take(self, step: int) -> Rollouts:
        """Waits for a step's batch. It stays here until the next step's is asked for: should this step fail, it
        belongs into the checkpoint of the one before.

        Raises:
            DarError: it could not be sampled, or not with weights that `max_staleness` allows.
        """
        try:
            rollouts = self.batches[step].result()
        except DarError as error:
            error.args = (f"the completions of step {step}, asked for ahead of it: {error}",)
            raise
        if not all(0 <= step - 1 - version <= self.lag for version in rollouts.versions or (-1,)):
            raise RolloutError(
                f"the completions of step {step} may be of weights {max(0, step - 1 - self.lag)} to {step - 1}, but "
                f"the engine says {sorted({*rollouts.versions})}: versions must be what was synced before `submit`"
            )
        return rollouts

    def metrics(self, step: int, rollouts: Rollouts) -> dict[str, float]:
        """How old the weights are that sampled a step's batch, in steps, and how long the engine was idle."""
        if self.lag == 0:
            return {}
        ages = [step - 1 - version for version in rollouts.versions]
        mean = sum(ages) / len(ages)
        return {"rollout/staleness": mean, "rollout/staleness_max": max(ages), "rollout/sampler_idle": self.idle}

    def cancel(self) -> None:
        """Gives up what has not begun."""
        for batch in self.batches.values():
            batch.cancel()

    def state(self, done: int) -> dict[str, Tensor]:
        """Waits for the batches of steps after `done`: all ranks' rows, by name. One that failed is left out."""
        found: dict[str, Tensor] = {}
        for step in self._kept(done):
            parts = [part for part in gathered(_sampled(self.batches.get(step))) if part is not None]
            if len(parts) == num_ranks():
                found |= {f"ahead.{step}.{name}": tensor for name, tensor in _tensors(joined(parts)).items()}
        return found

    def restore(self, done: int, state: Mapping[str, Tensor], stream: PromptStream) -> None:
        """Takes back what `state` gave, this rank's rows of it; what does not fit the recipe any more is left out."""
        for step in self._kept(done):
            prefix = f"ahead.{step}."
            tensors = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
            own = _own_rollouts(tensors, stream.at(step - 1), self.num_generations) if tensors else None
            if own is None or step - 1 - min(own.versions) > self.lag:
                log.warning("the checkpoint has no completions of step %d that fit: its weights sample them", step)
                continue
            self.batches[step] = Future()
            self.batches[step].set_result(own)

    def _kept(self, done: int) -> range:
        """The steps whose batches were asked for by the end of step `done`."""
        return range(done + 1, min(done + self.lag, self.last) + 1)

    def _note_end(self, _: Future[Rollouts]) -> None:
        self._ended = time.perf_counter()


def _sampled(batch: Future[Rollouts] | None) -> Rollouts | None:
    """What came of it, when it has come to an end; None where that was an error, or where nothing was asked for."""
    if batch is None:
        return None
    wait([batch])
    return None if batch.cancelled() or batch.exception() is not None else batch.result()


def _tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    groups = rollouts.groups
    said = json.dumps([groups.prompt_ids, rollouts.texts, rollouts.finish_reasons, rollouts.versions])
    found = {
        "completion_ids": groups.completion_ids,
        "mask": groups.mask,
        "lengths": groups.lengths,
        "logprobs": rollouts.logprobs,
        "said": torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8),
    }
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _own_rollouts(tensors: Mapping[str, Tensor], prompts: Sequence[Prompt], per_prompt: int) -> Rollouts | None:
    """This rank's share of a batch; None where it is not of so many completions of these prompts any more."""
    prompt_ids, texts, reasons, versions = json.loads(bytes(tensors["said"].tolist()))
    ids = tuple(prompt.token_ids for prompt in prompts)
    if tuple(map(tuple, prompt_ids)) != ids or len(texts) != len(prompts) * per_prompt:
        return None
    sizes, (first, stop) = (per_prompt,) * len(prompts), own_groups(len(prompts))
    groups = TokenGroups(ids, sizes, tensors["completion_ids"], tensors["mask"], tensors["lengths"])
    texts, reasons, versions = map(tuple, (texts, reasons, versions))
    whole = Rollouts(tuple(prompts), groups, texts, tensors["logprobs"], reasons, versions=versions)
    return whole.select(torch.tensor([first <= index < stop for index in range(len(prompts))]))
