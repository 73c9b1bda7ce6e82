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
from dar.shown import one_line

_RESULTS = ("eval/reward", "eval/return", "eval/accuracy", "reward", "accuracy", "loss")


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
    if not runs:
        Console(stderr=True).print(f"no run in {folder} or below; dar train RECIPE makes one", soft_wrap=True)
        return
    lines = [("run", "written", "method", "model", "steps", "state", "first → last")]
    for run in runs:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["written"]))
        steps = f"{run['done']}/{run['steps'] or '?'}"
        result = f"{run['metric']} {run['first']:+.3f} → {run['last']:+.3f}" if run["metric"] else ""
        lines.append((run["folder"], when, run["method"], Path(run["model"]).name, steps, run["state"], result))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths))
        Console().print("  ".join(cells).rstrip(), soft_wrap=True)


def _described(path: Path) -> dict[str, Any]:
    from dar.record.folder import RunFolder
    from dar.report.run import load_training

    method, model, steps, rows = "?", "?", None, []
    written = max(os.path.getmtime(file) for file in (path / "config.yaml", path / "metrics.jsonl") if file.exists())
    try:
        run, rows = load_training(path), RunFolder(path).metrics()
        method, model, steps = run.method, run.model, run.spec.steps
        if run.is_finished:
            state = "finished"
        elif time.time() - written < max([300.0, *(3 * row.get("step_time", 0.0) for row in rows[-5:])]):
            state = "running"
        else:
            state = "stopped" if any(RunFolder(path).checkpoints.glob("step-*")) else "failed"
    except DarError as error:
        state = f"damaged: {one_line(str(error))}"
    metric = next((key for key in _RESULTS if any(key in row for row in rows)), None)
    values = [row[metric] for row in rows if metric in row] or [None]
    return {
        "folder": str(path), "written": written, "method": method, "model": model, "state": state,
        "done": max((row["step"] for row in rows), default=0), "steps": steps,
        "metric": metric, "first": values[0], "last": values[-1],
    }  # fmt: skip
