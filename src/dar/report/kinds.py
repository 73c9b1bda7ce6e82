"""The kinds of training that a report reads, as records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dar.config.control import ControlSpec
from dar.config.recorded import RecordedSpec
from dar.config.reward_model import RewardModelSpec
from dar.config.run import RunSpec
from dar.errors import CheckpointError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder


@dataclass(frozen=True)
class CompletionFile:
    """The recorded completions of one training step, or of one held-out evaluation."""

    step: int
    is_heldout: bool
    path: Path

    @property
    def label(self) -> str:
        return f"held-out, after step {self.step}" if self.is_heldout else f"training step {self.step}"

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The table, or those of `columns` that it has.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            known = file.schema_arrow.names
            return file.read(known if columns is None else [name for name in columns if name in known])
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Training:
    """What every training leaves behind.

    name: of its folder, as it is shown.
    steps, evaluations: the lines of metrics.jsonl, in order; an evaluation's keys without `eval/`, `step` apart.
    completions: training steps and evaluations whose completions were recorded, in order.
    spec: its recipe, or what is known in its place.
    evaluation: what evaluation.json holds, which runs of policies do not have.
    """

    name: str
    path: Path
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    alerts: list[Alert]
    completions: list[CompletionFile]
    evaluation: dict[str, Any]
    spec: Any

    @property
    def method(self) -> str:
        return self.spec.method

    @property
    def model(self) -> str:
        """Where its first weights came from, or what is controlled."""
        return self.spec.model.path

    @property
    def data(self) -> str | None:
        return self.spec.data.train.path

    @property
    def is_finished(self) -> bool:
        """Whether it took the steps that were asked for, where that is known."""
        return self.spec.steps is not None and self.last_step >= self.spec.steps

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in (*self.steps, *self.evaluations)), default=0)

    def heldout_file(self, step: int) -> CompletionFile | None:
        """The completions of the evaluation after `step`."""
        return next((file for file in self.completions if file.is_heldout and file.step == step), None)

    def total(self, key: str) -> float | None:
        """Sum over all steps of a metric whose lines are means since the one before; None where it has none."""
        before = [0, *(row["step"] for row in self.steps)]
        parts = [row[key] * (row["step"] - last) for row, last in zip(self.steps, before) if key in row]
        return math.fsum(parts) if parts else None

    def series(self, key: str, *, heldout: bool = False) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it was recorded."""
        rows = [row for row in (self.evaluations if heldout else self.steps) if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


@dataclass(frozen=True)
class Run(Training):
    """One run of a policy, of this library or another trainer's."""

    @property
    def learns_from_data(self) -> bool:
        """Whether it samples nothing that is rewarded, as far as its metrics say."""
        return not any("reward" in row for row in self.steps)

    @property
    def stopped_by(self) -> Alert | None:
        """The alert that ended the run before its last step: nothing has been recorded of a later step."""
        if self.is_finished:
            return None
        return next((alert for alert in self.alerts if (alert.action, alert.step) == ("stop", self.last_step)), None)


@dataclass(frozen=True)
class RecipeRun(Run):
    """One that this library made."""

    spec: RunSpec

    @property
    def method(self) -> str:
        return self.spec.algorithm.type

    @property
    def learns_from_data(self) -> bool:
        return self.spec.algorithm.logged is not None


@dataclass(frozen=True)
class RecordedRun(Run):
    """One that another trainer made.

    reasons: why a part of the page is not there, by its name. notes: where its figures come from.
    """

    spec: RecordedSpec
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def data(self) -> str | None:
        return self.spec.data


@dataclass(frozen=True)
class RewardModelRun(Training):
    """One training of a reward model, with its evaluation `before` and, at the end, `after`."""

    spec: RewardModelSpec

    @property
    def method(self) -> str:
        return "reward-model"

    @property
    def is_finished(self) -> bool:
        return RunFolder(self.path).model.is_dir()


@dataclass(frozen=True)
class ControlRun(Training):
    """One training of a controller, with its last evaluation."""

    spec: ControlSpec
    stopped_by: None = None

    @property
    def model(self) -> str:
        return self.spec.environment


AnyRuns = Sequence[Run] | Sequence[ControlRun] | RewardModelRun
"""What a page, pictures or figures are of."""
