"""`dar ls`: the runs that are there."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, print_json
from dar.console import Console


def ls(
    folder: Annotated[Path, typer.Argument(help="Where to look, and in the folders below.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first: how far each is, and its reward at the beginning and now."""
    from dar.report.listing import list_runs

    runs = list_runs(folder.expanduser())
    if as_json:
        print_json([asdict(run) for run in runs])
        return
    lines = [("run", "written", "method", "model", "steps", "state", "first → last")] if runs else []
    for run in runs:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written))
        steps = f"{run.done}/{run.steps}" if run.steps else str(run.done)
        result = "" if run.first is None else f"{run.metric} {run.first:+.3f} → {run.last:+.3f}"
        lines.append((run.folder, when, run.method, run.model.rpartition("/")[2], steps, run.state, result))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        Console().print(text, soft_wrap=True)
    if not runs:
        Console(stderr=True).print(f"no run in {folder} or below; a run is made by dar train RECIPE", soft_wrap=True)
