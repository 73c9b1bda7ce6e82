"""Writing down what a run does: metrics.jsonl, alerts, trackers, callbacks, completion tables and the screen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dar.batch import Rollouts, Weighted
from dar.record.completions import TOKENS, prompt_text, sample_columns
from dar.record.folder import RunFolder
from dar.record.measures import MEASURES, measures_of
from dar.record.watch import Watch
from dar.rewards import RewardTable
from dar.run.display import Display
from dar.run.heldout import HeldoutResult
from dar.run.stopping import Control
from dar.shown import redacted


class Callback(Protocol):
    """Told about a run as it goes on, and able to ask something of it."""

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        """A line was added to metrics.jsonl: a training step, or (all keys `eval/…`) a held-out evaluation.

        What is asked of `control` (`stop(reason)`, `save()`, `evaluate()`) is done once the step is finished.
        """
        ...


@dataclass(frozen=True)
class Recorder:
    """Sends what happens to everything that keeps it. Only the main process writes."""

    folder: RunFolder
    display: Display
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    every: int
    watch: Watch
    callbacks: Sequence[Callback] = ()
    control: Control = field(default_factory=Control)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished training step."""
        shown = step % self.every == 0
        self._metrics(step, metrics, tracked=shown)
        self.display.step(step, metrics, shown=shown)

    def heldout(self, step: int, found: Mapping[str, float], result: HeldoutResult | None, *, seconds: float) -> None:
        """What a held-out evaluation found, and the completions it sampled, if it did."""
        if not self.accelerator.is_main_process:
            return
        line = {f"eval/{name}": value for name, value in {**found, "time": seconds}.items()}
        self._metrics(step, line, tracked=True)
        if result is not None:
            known = result.logprobs, result.ref_logprobs, self.tokenizer, result.gold
            columns = sample_columns(result.rollouts, result.rewards, *known)
            self._table("eval/completions", step, columns)
            self.folder.write_completions(f"heldout-step-{step}", columns)
        shown = [one for one in measures_of(found) if one not in MEASURES[6:] and not one.is_part]
        said = ", ".join(f"{one.label} {one.shown(found[one.key])}" for one in shown)
        self.display.note(f"held-out after step {step}: {said} ({seconds:.0f} s)")

    def completions(
        self, step: int, rollouts: Rollouts, rewards: RewardTable, ref_logprobs: Tensor | None, weighted: Weighted
    ) -> None:
        """The completions of a training step, with all that decided about them; one is shown."""
        if not self.accelerator.is_main_process:
            return
        columns = sample_columns(rollouts, rewards, rollouts.logprobs, ref_logprobs, self.tokenizer)
        advantages = weighted.advantages
        # Where every token has its own, the row shows their mean.
        rows = advantages if advantages.ndim == 1 else advantages.sum(1) / weighted.mask.sum(1)
        # A completion without a reward has neither.
        columns["advantage"] = weighted.to_table(rows, absent=0.0).flatten().tolist()
        columns["weight"] = weighted.to_table(weighted.weights, absent=0.0).flatten().tolist()
        self._table("completions", step, columns)
        self.folder.write_completions(f"step-{step}", columns)
        if rollouts.images is None:
            best = int(rewards.total[0].argmax())
            prompt = prompt_text(rollouts.prompts[0].content)
            self.display.completion(prompt, rollouts.texts[best], float(rewards.total[0, best]))

    def _table(self, name: str, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Completions for the trackers that show tables."""
        columns = {name: values for name, values in columns.items() if name not in TOKENS}
        rows = [[redacted(each) if isinstance(each, str) else each for each in row] for row in zip(*columns.values())]
        for tracker in self.accelerator.trackers:
            if tracker.name in ("trackio", "wandb") and "image" not in columns:
                tracker.log({name: import_module(tracker.name).Table(columns=list(columns), data=rows)}, step=step)

    def _metrics(self, step: int, metrics: Mapping[str, float], *, tracked: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.append_metrics({"step": step, **metrics})
        if tracked:
            # mlflow refuses some signs, and may keep `kl` as a file where `kl/ref` needs a folder.
            dotted = {re.sub(r"[^\w-]", ".", key): value for key, value in metrics.items()}
            for tracker in self.accelerator.trackers:
                tracker.log(dotted if tracker.name == "mlflow" else dict(metrics), step=step)
        for callback in self.callbacks:
            callback.on_metrics(step, dict(metrics), self.control)
        for alert in self.watch.see({"step": step, **metrics}):
            self.folder.append_alert(asdict(alert))
            self.display.alert(alert)
            self.control.is_stopping |= alert.action == "stop"
