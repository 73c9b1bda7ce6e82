"""A run as the report reads it: what stands in its folder, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from dar.config.base import Spec
from dar.config.control import ControlSpec
from dar.config.recipe import load_recipe, read_yaml
from dar.config.reward_model import RewardModelSpec
from dar.config.run import RunSpec
from dar.errors import CheckpointError, ConfigError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder
from dar.record.measures import evaluations
from dar.shown import one_line

_COMPLETIONS = re.compile(r"(heldout-)?step-(\d+)\.parquet")


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
    spec: its recipe.
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
    def last_step(self) -> int:
        return max((row["step"] for row in (*self.steps, *self.evaluations)), default=0)

    def heldout_file(self, step: int) -> CompletionFile | None:
        """The completions of the evaluation after `step`."""
        return next((file for file in self.completions if file.is_heldout and file.step == step), None)

    def series(self, key: str, *, heldout: bool = False) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it was recorded."""
        rows = [row for row in (self.evaluations if heldout else self.steps) if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


@dataclass(frozen=True)
class Run(Training):
    """One run of a policy."""

    spec: RunSpec

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.spec.steps

    @property
    def stopped_by(self) -> Alert | None:
        """The alert that ended the run before its last step: nothing has been recorded of a later step."""
        if self.is_finished:
            return None
        return next((alert for alert in self.alerts if (alert.action, alert.step) == ("stop", self.last_step)), None)


@dataclass(frozen=True)
class RewardModelRun(Training):
    """One training of a reward model, with its evaluation `before` and, at the end, `after`."""

    spec: RewardModelSpec

    @property
    def is_finished(self) -> bool:
        return RunFolder(self.path).model.is_dir()


@dataclass(frozen=True)
class ControlRun(Training):
    """One training of a controller, with its last evaluation."""

    spec: ControlSpec
    stopped_by: None = None

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.spec.steps


AnyRuns = Sequence[Run] | Sequence[ControlRun] | RewardModelRun
"""What a page, pictures or figures are of."""


_SPECS: dict[type[Training], type[Spec]] = {Run: RunSpec, RewardModelRun: RewardModelSpec, ControlRun: ControlSpec}
Kind = TypeVar("Kind", bound=Training)


def load_run(path: str | Path, kind: type[Kind] = Run) -> Kind:
    """Reads the run folder of a kind of training; a run that is still going on is read as far as it is.

    Raises:
        ConfigError: the folder holds no run, or its recipe is not one.
        CheckpointError: a file of it is damaged.
    """
    folder = _run_folder(path)
    return kind(**_recorded(folder), spec=load_recipe(folder.path / "config.yaml", kind=_SPECS[kind]))


def load_training(path: str | Path) -> Run | RewardModelRun | ControlRun:
    """Reads a run folder, of a policy, a reward model or a controller. Raises as `load_run`."""
    raw = read_yaml(_run_folder(path).path / "config.yaml")
    keys = raw if isinstance(raw, dict) else ()
    return load_run(path, ControlRun if "environment" in keys else RewardModelRun if "pairs_per_step" in keys else Run)


def load_trainings(paths: Sequence[str | Path]) -> list[Run] | list[ControlRun] | RewardModelRun:
    """Runs of policies, or of controllers if the first is one; or a reward model's, if its folder is all there is."""
    here = RunFolder(paths[0]).path
    first = next((load_training(path) for path in (here, *here.glob("*")) if RunFolder(path).is_run), None)
    if isinstance(first, RewardModelRun) and len(paths) == 1 and first.path == here:
        return first
    return load_runs(paths, ControlRun) if isinstance(first, ControlRun) else load_runs(paths)


def load_runs(paths: Sequence[str | Path], kind: type[Kind] = Run) -> list[Kind]:
    """Reads run folders; a folder of `dar compare` stands for the runs in it, in the order in which they were started.

    Raises:
        ConfigError: a folder holds neither, or a run is given twice.
        CheckpointError: a file of one is damaged.
    """
    found: list[Kind] = []
    for path in (RunFolder(path).path for path in paths):
        inside = sorted(path.glob("*/config.yaml")) if not RunFolder(path).is_run else []
        runs = [load_run(file.parent, kind) for file in inside] or [load_run(path, kind)]
        found += sorted(runs, key=lambda run: run.environment.get("started", ""))
    places = [run.path.resolve() for run in found]
    if twice := sorted({str(place) for place in places if places.count(place) > 1}):
        raise ConfigError(f"{twice[0]} is given twice")
    return found


def _run_folder(path: str | Path) -> RunFolder:
    """The folder of a run. Raises ConfigError where it is none, saying what it is instead."""
    folder = RunFolder(path)
    if folder.is_run:
        return folder
    here, found = folder.path, "not a run folder: it has no config.yaml"
    if here.suffix in (".yaml", ".yml"):
        found = "a recipe, and a report is of what came of one"
    elif not here.exists():
        found = "not there"
    runs = [parent for parent in here.resolve().parents[:2] if RunFolder(parent).is_run]
    advice = f"Its run is {runs[0]}." if runs else "Give the output_dir of a run, or the --out of `dar compare`."
    raise ConfigError(f"{here} is {found}. {advice}")


def _recorded(folder: RunFolder) -> dict[str, Any]:
    rows = folder.metrics()
    return {
        "name": one_line(folder.path.resolve().name, 100),
        "path": folder.path,
        "environment": folder.environment(),
        "steps": [row for row in rows if not evaluations([row])],
        "evaluations": evaluations(rows),
        "alerts": [_alert(folder, row) for row in folder.alerts()],
        "completions": _completion_files(folder.path / "completions"),
        "evaluation": folder.evaluation(),
    }


def _alert(folder: RunFolder, row: dict[str, Any]) -> Alert:
    try:
        return Alert(**{field.name: row[field.name] for field in fields(Alert)})
    except KeyError as error:
        raise CheckpointError(f"{folder.path / 'alerts.jsonl'}: an alert without {error}: {row}") from error


def _completion_files(folder: Path) -> list[CompletionFile]:
    found = []
    for file in folder.glob("*.parquet"):
        if match := _COMPLETIONS.fullmatch(file.name):
            found.append(CompletionFile(int(match[2]), match[1] is not None, file))
    return sorted(found, key=lambda file: (file.step, file.is_heldout))
