"""Taking steps: what every kind of training does around one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dar.collective import from_main, gathered, num_ranks, own_rank
from dar.errors import CheckpointError, DarError, RankError
from dar.learn.checkpoint import TrainState, load_checkpoint, newest_valid, read_state, save_checkpoint
from dar.learn.ranks import lost_ranks_named
from dar.record.folder import RunFolder
from dar.run.display import Display
from dar.run.stopping import Control, signals_handled
from dar.run.trainer_callbacks import TrainerCallbacks

log = logging.getLogger(__name__)


class Steps(ABC):
    """Resumes, evaluates, saves and stops; a kind of training says what a step is and what is kept of it.

    spec: the recipe.
    folder: of the run.
    display: shows it.
    start: begins the run's record, told whether it goes on with one; called when the checks before step 1 have passed.
    control: what it was asked to do after the present step.
    trainer_callbacks: those of transformers, which are told of its events.
    num_steps: the last step.
    optimizer: of the weights.
    initial: fingerprint of the weights before training, which a resumed run must find again.
    """

    spec: Any
    num_steps: int
    optimizer: torch.optim.Optimizer
    initial: str
    folder: RunFolder
    display: Display
    start: Callable[[bool], None]
    control: Control
    trainer_callbacks: TrainerCallbacks | None = None
    _done: int = 0
    _is_whole: bool = True

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""

    def begin(self) -> None:  # noqa: B027 - few prepare anything
        """Before the first step of a run that is not resumed."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Takes a step (from 1) and writes down what it came to."""

    @abstractmethod
    def evaluation_due(self, step: int) -> bool:
        """Whether there is to be an evaluation after that many steps."""

    @abstractmethod
    def evaluate(self, step: int) -> None:
        """What held-out data says after that many steps; nothing where there is none."""

    @abstractmethod
    def state(self, step: int) -> TrainState:
        """The plain numbers of a checkpoint."""

    @abstractmethod
    def restore(self, state: TrainState, extras: Mapping[str, Tensor]) -> None:
        """Takes back what `state` and `extras` gave."""

    def reshape(self, state: TrainState) -> None:  # noqa: B027 - few have such weights
        """Gives weights whose shapes change those of a checkpoint, before it is read."""

    def extras(self) -> dict[str, Tensor]:
        """Tensors that change from step to step beside the weights, by name."""
        return {}

    def _tell(self, event: str) -> None:
        if self.trainer_callbacks is not None:
            self.trainer_callbacks.tell(event, self.control)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and shows: alone, or the first."""
        return own_rank() == 0

    def agreed(self, *wishes: bool) -> list[bool]:
        """Each wish, on every rank, where any rank has it: signals, alerts and callbacks are known to one alone."""
        return [any(column) for column in zip(*gathered(wishes))]

    def run(self, *, resume: bool | Path) -> int:
        """Trains to the last step.

        Args:
            resume: continue from the newest valid checkpoint of the run folder, if it holds any step, or from that one,
                whereby later ones are forgotten.

        Returns:
            The number of completed steps: `num_steps`, or fewer after Ctrl-C, SIGTERM, an alert or a callback that
            stops the run; a checkpoint is then saved, unless no step was taken.

        Raises:
            DarError: whatever went wrong, in words; nothing already saved is lost.
        """
        if resume and not self.folder.has_steps:
            resume = False
            self.display.note(f"{self.folder.path} holds no step to continue from: starting")
        self._done = self._restored(None if resume is True else resume) if resume else 0
        self.optimizer.register_step_pre_hook(self._begin_change)
        if self._done == 0:
            self.begin()
        self.start(bool(resume))
        lost = lost_ranks_named(self.spec.runtime)
        with self.display.live(self._done), signals_handled(self.ask_to_stop), lost:
            try:
                self._train()
            except Exception as error:  # what a method or an engine of the user's own raises too
                # Saving takes all ranks, and only a DarError is all ranks' (dar.collective); the others' of what is
                # none is a RankError.
                is_shared = isinstance(error, DarError) and not isinstance(error, RankError)
                if self._done > 0 and self._is_whole and (is_shared or num_ranks() == 1):
                    self._save()
                    self.display.note(f"saved after step {self._done}; continue with --resume")
                raise
        return self._done

    def _train(self) -> None:
        self._tell("on_train_begin")
        # Step 0, or a step whose evaluation an earlier run could not finish.
        is_lacking = self.is_main and not self.folder.is_evaluated(self._done)
        if self.evaluation_due(self._done) and self.agreed(is_lacking)[0]:
            self.evaluate(self._done)
        control = self.control
        (is_stopping,) = self.agreed(control.is_stopping)
        while self._done < self.num_steps and not is_stopping:
            step = self._done + 1
            self._tell("on_step_begin")
            self.advance(step)
            self._done, self._is_whole = step, True
            if self.evaluation_due(step) or self.agreed(control.is_evaluating)[0]:
                self.evaluate(self._done)
            is_stopping, is_saving = self.agreed(control.is_stopping, control.is_saving)
            if step == self.num_steps or is_stopping or is_saving or due(step, self.spec.checkpoint.every):
                self._save()
                self._tell("on_save")
            control.is_saving = control.is_evaluating = False
        if control.reason is not None:
            self.display.note(f"stopped after step {self._done}: {control.reason}")
        self._tell("on_train_end")

    def _save(self) -> None:
        save_checkpoint(
            self.folder.checkpoints,
            self.state(self._done),
            self.trainable(),
            self.optimizer,
            self.extras(),
            keep=self.spec.checkpoint.keep,
        )

    def _restored(self, chosen: Path | None = None) -> int:
        """Goes back to the newest checkpoint, or the chosen one; the number of its step."""
        checkpoint, step = from_main(lambda: newest_valid(self.folder.checkpoints, chosen)), -1
        if checkpoint is None:
            log.warning("%s has no checkpoint yet; starting from the beginning", self.folder.path)
        else:
            state = read_state(checkpoint)
            saved = state.reference
            if saved != self.initial:
                raise CheckpointError(
                    f"{checkpoint} was trained from another initial model: π₀'s weights differ (saved {saved[:12]}, "
                    f"here {self.initial[:12]}). Resume with the model the run was started from."
                )
            self.reshape(state)
            extras = self.extras()
            load_checkpoint(checkpoint, self.trainable(), self.optimizer, extras)
            self.restore(state, extras)
            step = state.step
        if self.is_main:
            self.folder.record_recipe(self.spec)
            self.folder.forget_after(step)
        if checkpoint is not None:
            self.display.note(f"continuing after step {step} ({checkpoint})")
        return max(step, 0)

    def _begin_change(self, *_: object) -> None:
        """The optimizer steps: until this step is finished, what is in memory is none that could be continued from."""
        self._is_whole = False

    def ask_to_stop(self, name: str) -> None:
        """A signal came: this step is finished first."""
        self.control.is_stopping = True
        self.display.note(f"{name}: finishing this step, then saving (again to stop at once)")


def due(step: int, every: int) -> bool:
    """Every so many steps; never where `every` is 0."""
    return every > 0 and step % every == 0
