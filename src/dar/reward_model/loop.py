"""Training a reward model: Bradley–Terry on preference pairs, a pair's common beginning computed once."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dar.collective import failing_together, gathered, num_ranks
from dar.config.reward_model import RewardModelSpec
from dar.data.order import ShuffledOrder
from dar.errors import NonFiniteError
from dar.learn.checkpoint import TrainState
from dar.learn.optim import clipped_step, set_learning_rate
from dar.learn.ranks import leave_ranks, own_groups
from dar.objectives.reward_model import bradley_terry, centering
from dar.policies.precision import Precision
from dar.record.environment import peak_memory_gb
from dar.record.folder import RunFolder
from dar.reward_model.pairs import TokenPair
from dar.reward_model.report import preference_report
from dar.reward_model.score_model import ScoreModel
from dar.run.display import Display
from dar.run.steps import Steps
from dar.run.stopping import Control

SUMMARY = ("loss", "accuracy", "ece", "mean_margin")
"""Figures of an evaluation that go to metrics.jsonl; evaluation.json has all."""


@dataclass
class RewardModelLoop(Steps):
    """One training: everything it needs, built by `dar.assembly`.

    pairs, heldout: to train on, and never trained on (perhaps none).
    initial: fingerprint of the weights before training, which a resumed run must find again.
    """

    spec: RewardModelSpec
    module: ScoreModel
    accelerator: Accelerator
    tokenizer: Any
    precision: Precision
    optimizer: torch.optim.Optimizer
    pairs: Sequence[TokenPair]
    heldout: Sequence[TokenPair]
    initial: str
    folder: RunFolder
    display: Display
    start: Callable[[bool], None]
    num_tokens: int = 0
    order: ShuffledOrder = field(init=False)
    control: Control = field(default_factory=Control, init=False)

    def __post_init__(self) -> None:
        self.trained: nn.Module = self.accelerator.prepare(self.module)
        self.order = ShuffledOrder(len(self.pairs), per_step=self.spec.pairs_per_step, seed=self.spec.seed)
        self.num_steps = self.spec.num_steps(len(self.pairs))

    @property
    def model(self) -> Any:
        """The transformers (or peft) model."""
        return self.module.model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def advance(self, step: int) -> None:
        metrics = self.step(step)
        with failing_together():
            if self.is_main:
                self.folder.append_metrics({"step": step, **metrics})
        self.display.step(step, metrics, shown=True)

    def evaluation_due(self, step: int) -> bool:
        return step in (0, self.num_steps)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the pairs of step `step` (from 1)."""
        started = time.perf_counter()
        self.display.phase("update")
        indices = self.order.indices(step - 1)
        first, stop = own_groups(len(indices))
        pairs = [self.pairs[index] for index in indices[first:stop]]
        units = [(pair.chosen, pair.rejected) for pair in pairs]
        sums: dict[str, float] = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "mean_reward": 0.0, "num_tokens": 0.0}
        sums["num_tokens"] = sum(len(row) for unit in units for row in unit)
        self.module.train()
        batches = self.module.batches(units, self.spec.runtime.max_tokens_per_microbatch)
        for batch in batches:
            with nullcontext() if batch is batches[-1] else self.accelerator.no_sync(self.trained):
                with self.precision.compute():
                    scores = self.trained([units[index] for index in batch]).view(-1, 2)
                margins = torch.tensor([pairs[index].margin for index in batch], device=scores.device)
                self._backward(scores, margins, sums, where=f"step {step}")
            self.display.tokens(sum(len(row) for index in batch for row in units[index]))
        self.module.eval()
        set_learning_rate(self.optimizer, self.spec.optim, step - 1, self.num_steps)
        parameters = list(self.trainable().values())
        norm = clipped_step(self.optimizer, parameters, self.spec.optim.max_grad_norm, where=f"step {step}")
        parts = gathered(sums)
        sums = {name: sum(part[name] for part in parts) for name in sums}
        self.num_tokens += int(sums.pop("num_tokens"))
        return {
            **{name: total / len(indices) for name, total in sums.items()},
            "grad_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "epoch": self.order.epoch(step),
            "num_tokens": self.num_tokens,
            "memory/peak_gb": peak_memory_gb(),
            "step_time": time.perf_counter() - started,
        }

    def _backward(self, scores: torch.Tensor, margins: torch.Tensor, sums: dict[str, float], *, where: str) -> None:
        """Adds the gradient of some pairs, and their part of the sums."""
        loss = self.spec.loss
        chosen, rejected = scores.unbind(1)
        losses = bradley_terry(chosen, rejected, margin=margins, label_smoothing=loss.label_smoothing)
        losses = losses + loss.centering_coef * centering(chosen, rejected)
        # With several ranks the gradient's norm says so, to all of them at once.
        if num_ranks() == 1 and not losses.isfinite().all():
            raise NonFiniteError(
                f"the loss is not finite at {where}; the weights were not changed. Try a lower optim.learning_rate or "
                "runtime.precision=fp32."
            )
        # DDP averages gradients over ranks; the denominator is already that of all pairs.
        (losses.sum() * self.accelerator.num_processes / self.spec.pairs_per_step).backward()
        lead = (chosen - rejected).detach()
        sums["loss"] += float(losses.detach().sum())
        sums["accuracy"] += float((lead > 0).float().sum() + 0.5 * (lead == 0).float().sum())
        sums["margin"] += float(lead.sum())
        sums["mean_reward"] += float(scores.detach().mean(1).sum())

    def evaluate(self, step: int) -> None:
        if not self.heldout:
            return
        when = "before" if step == 0 else "after"
        self.display.phase("heldout")
        first, stop = own_groups(len(self.heldout))
        units = [(pair.chosen, pair.rejected) for pair in self.heldout[first:stop]]
        scores = self.module.score(units, self.precision, max_tokens=self.spec.runtime.max_tokens_per_microbatch)
        scores = [each for part in gathered(scores) for each in part]
        report = preference_report(
            [chosen for chosen, _ in scores],
            [rejected for _, rejected in scores],
            [pair.longer_by for pair in self.heldout],
        )
        with failing_together():
            if self.is_main:
                self.folder.write_evaluation({**self.folder.evaluation(), when: report})
                self.folder.append_metrics({"step": step, **{f"eval/{name}": report[name] for name in SUMMARY}})
        self.display.note(
            f"held-out {when} training: accuracy {report['accuracy']:.1%} ± {report['accuracy_se']:.1%} (s.e.) "
            f"on {report['num_pairs']} pairs; longer wins (tokens) {report['longer_wins_accuracy']:.1%}"
        )

    def end(self) -> None:
        """Lets go of the ranks; the loop takes no step after this."""
        self.trained = self.accelerator.unwrap_model(self.trained)
        self.accelerator.free_memory()
        atexit.register(leave_ranks)

    def state(self, step: int) -> TrainState:
        return TrainState(step, self.num_tokens, self.initial)

    def restore(self, state: TrainState, extras: Mapping[str, Tensor]) -> None:
        self.num_tokens = state.num_tokens
