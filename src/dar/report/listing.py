"""The runs below a folder, a few words of each."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from dar.config.recipe import read_yaml
from dar.errors import ConfigError, DarError
from dar.run.folder import RunFolder

_OF_A_RUN = {"checkpoints", "completions", "model", "best"}
_RESULTS = ("eval/reward", "eval/accuracy", "reward", "accuracy", "loss")


@dataclass(frozen=True)
class Listed:
    """A run in short.

    written: when it was last written to, in seconds since 1970.
    method, model: `reward-model` for a run of that command; the model's path.
    done, steps: how far it is, and how far it goes, where the recipe says so.
    state: `finished`; `running`, where it was written to within five minutes or three steps; `stopped`, to be continued
        with --resume; `failed`, without a checkpoint; or what cannot be read of it.
    metric: which of its measures `first` and `last` are, held-out ones before those of training.
    """

    folder: str
    written: float
    method: str = ""
    model: str = ""
    done: int = 0
    steps: int | None = None
    state: str = ""
    metric: str | None = None
    first: float | None = None
    last: float | None = None


def list_runs(folder: Path) -> list[Listed]:
    """Every run below a folder, hidden ones apart; the one written to last comes first.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if {"config.yaml", "environment.json"} <= set(files):
            found.append(_listed(RunFolder(path)))
            folders[:] = [name for name in folders if name not in _OF_A_RUN]
    return sorted(found, key=lambda run: run.written, reverse=True)


def _listed(run: RunFolder) -> Listed:
    files = [file for name in ("config.yaml", "metrics.jsonl") if (file := run.path / name).exists()]
    written = max(file.stat().st_mtime for file in files)
    try:
        recipe, rows = read_yaml(run.path / "config.yaml"), run.metrics()
        method = recipe["algorithm"]["type"] if "algorithm" in recipe else "reward-model"
        model, steps = str(recipe["model"]["path"]), recipe["steps"]
    except (DarError, KeyError, TypeError) as error:
        return Listed(str(run.path), written, state=f"damaged: {error}")
    metric = next((key for key in _RESULTS if any(key in row for row in rows)), None)
    values = [row[metric] for row in rows if metric in row]
    ends = {"metric": metric, "first": values[0], "last": values[-1]} if values else {}
    done = max((row["step"] for row in rows), default=0)
    if run.model.exists() and done >= (steps or 0):
        state = "finished"
    elif time.time() - written < max(300.0, 3 * max((row.get("step_time", 0.0) for row in rows[-5:]), default=0.0)):
        state = "running"
    else:
        state = "stopped" if any(run.checkpoints.glob("step-*")) else "failed"
    return Listed(str(run.path), written, method, model, done, steps, state, **ends)
