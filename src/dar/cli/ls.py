"""`dar ls`: the runs that are there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dar.cli.common import AsJson, print_json
from dar.console import Console
from dar.errors import ConfigError, DarError

_RESULTS = ("eval/reward", "eval/accuracy", "reward", "accuracy", "loss")


def ls(
    folder: Annotated[Path, typer.Argument(help="Where to look, and in the folders below.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first: how far each is, and its reward at the beginning and now.

    A run is running if it was written to within five minutes or three steps, stopped if --resume can continue it, and
    failed if it has no checkpoint.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    runs = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if {"config.yaml", "environment.json"} <= set(files):
            runs.append(_described(Path(path)))
    runs.sort(key=lambda run: run["written"], reverse=True)
    if as_json:
        print_json(runs)
        return
    lines = [("run", "written", "method", "model", "steps", "state", "first → last")] if runs else []
    for run in runs:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["written"]))
        steps = f"{run['done']}/{run['steps'] or '?'}"
        result = f"{run['metric']} {run['first']:+.3f} → {run['last']:+.3f}" if run["metric"] else ""
        lines.append((run["folder"], when, run["method"], Path(run["model"]).name, steps, run["state"], result))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths))
        Console().print("  ".join(cells).rstrip(), soft_wrap=True)
    if not runs:
        Console(stderr=True).print(f"no run in {folder} or below; dar train RECIPE makes one", soft_wrap=True)


def _described(path: Path) -> dict[str, Any]:
    from dar.config.recipe import read_yaml
    from dar.run.folder import RunFolder

    run, recipe, rows, problem = RunFolder(path), {}, [], None
    try:
        recipe, rows = read_yaml(path / "config.yaml"), run.metrics()
        method = recipe.get("algorithm", {"type": "reward-model"})["type"]
        model, steps = recipe["model"]["path"], recipe["steps"]
    except (DarError, AttributeError, KeyError, TypeError) as error:
        method, model, steps, problem = "?", "?", None, f"damaged: {error}"
    written = max(os.path.getmtime(file) for file in (path / "config.yaml", path / "metrics.jsonl") if file.exists())
    done = max((row["step"] for row in rows), default=0)
    pause = max([300.0, *(3 * row.get("step_time", 0.0) for row in rows[-5:])])
    if run.model.exists() and done >= (steps or 0):
        state = "finished"
    elif time.time() - written < pause:
        state = "running"
    else:
        state = "stopped" if any(run.checkpoints.glob("step-*")) else "failed"
    metric = next((key for key in _RESULTS if any(key in row for row in rows)), None)
    values = [row[metric] for row in rows if metric in row] or [None]
    found = {
        "folder": str(path),
        "written": written,
        "method": method,
        "model": str(model),
        "done": done,
        "steps": steps,
    }
    return found | {"state": problem or state, "metric": metric, "first": values[0], "last": values[-1]}
