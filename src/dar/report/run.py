"""A run as the report reads it: what stands in its folder, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from dar.config.base import Spec
from dar.config.control import ControlSpec
from dar.config.recipe import load_recipe, read_yaml
from dar.config.recorded import RecordedSpec
from dar.config.reward_model import RewardModelSpec
from dar.config.run import RunSpec
from dar.errors import CheckpointError, ConfigError
from dar.record.alerts import Alert
from dar.record.folder import RunFolder
from dar.record.measures import evaluations
from dar.report.foreign.trl import read_trl
from dar.report.foreign.verl import read_verl
from dar.report.kinds import CompletionFile, ControlRun, RecipeRun, RecordedRun, RewardModelRun, Run, Training
from dar.shown import one_line

_COMPLETIONS = re.compile(r"(heldout-)?step-(\d+)\.parquet")

_SPECS: dict[type[Training], type[Spec]] = {
    RecipeRun: RunSpec, RecordedRun: RecordedSpec, RewardModelRun: RewardModelSpec, ControlRun: ControlSpec
}  # fmt: skip
_TOLD_BY = {"environment": ControlRun, "pairs_per_step": RewardModelRun, "trainer": RecordedRun}
"""A key that only one kind's config.yaml has."""
Kind = TypeVar("Kind", bound=Training)


def load_run(path: str | Path, kind: type[Kind] = Run) -> Kind:
    """Reads the run folder of a kind of training; a run that is still going on is read as far as it is.

    Raises:
        ConfigError: the folder holds no run, or its recipe is not one.
        CheckpointError: a file of it is damaged.
    """
    if issubclass(kind, Run) and (foreign := _foreign(path)):
        return foreign  # pyright: ignore[reportReturnType]
    folder = _run_folder(path)
    exact: Any = kind
    if kind is Run:
        exact = RecordedRun if _kind(folder) is RecordedRun else RecipeRun
    spec = load_recipe(folder.path / "config.yaml", kind=_SPECS[exact])
    return exact(**_recorded(folder), spec=spec)


def load_training(path: str | Path) -> Run | RewardModelRun | ControlRun:
    """Reads a run folder, of a policy, a reward model or a controller. Raises as `load_run`."""
    return load_run(path, _kind(_run_folder(path)))


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
        is_whole = RunFolder(path).is_run or _foreign(path)
        inside = [] if is_whole else sorted(path.glob("*/config.yaml"))
        runs = [load_run(file.parent, kind) for file in inside] or [load_run(path, kind)]
        found += sorted(runs, key=lambda run: run.environment.get("started", ""))
    places = [run.path.resolve() for run in found]
    if twice := sorted({str(place) for place in places if places.count(place) > 1}):
        raise ConfigError(f"{twice[0]} is given twice")
    return found


def _foreign(path: str | Path) -> RecordedRun | None:
    folder = RunFolder(path)
    return None if folder.is_run else read_trl(folder.path) or read_verl(folder.path)


def _kind(folder: RunFolder) -> type[RecipeRun] | type[RecordedRun] | type[RewardModelRun] | type[ControlRun]:
    raw = read_yaml(folder.path / "config.yaml")
    keys = raw if isinstance(raw, dict) else ()
    return next((kind for key, kind in _TOLD_BY.items() if key in keys), RecipeRun)


def _run_folder(path: str | Path) -> RunFolder:
    """The folder of a run. Raises ConfigError where it is none, saying what it is instead."""
    folder = RunFolder(path)
    if folder.is_run:
        return folder
    here, found = folder.path, "not a run folder: it has no config.yaml, trainer_state.json (TRL) or N.jsonl (verl)"
    if here.suffix in (".yaml", ".yml"):
        found = "a recipe, and a report is of what came of one"
    elif not here.exists():
        found = "not there"
    runs = [parent for parent in here.resolve().parents[:2] if RunFolder(parent).is_run]
    others = "Give the output_dir of a run or of TRL, the --out of `dar compare`, or a folder of verl's dumps."
    advice = f"Its run is {runs[0]}." if runs else others
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
