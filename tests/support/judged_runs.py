"""Small runs with a judge, and what is left of them when time is taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dar.assembly.loop import build_loop
from dar.config.recipe import load_recipe
from dar.trainer import run_loop


def judged_training(write_recipe: Callable[..., Path], root: Path) -> Callable[..., Path]:
    """A function that runs a small recipe with a judge: 3 steps of 8 completions. It returns the run folder.

    Args:
        write_recipe: the fixture.
        root: where run folders are made.
    """

    def run(
        name: str,
        url: str,
        *,
        algorithm: Any = "dar",
        endpoint: dict[str, Any] | None = None,
        resume: bool = False,
        **reward: Any,
    ) -> Path:
        judge = {"type": "judge", "endpoint": {"base_url": url, "model": "m", "concurrency": 3} | (endpoint or {})}
        folder = root / name
        settings = {"algorithm": algorithm, "output_dir": str(folder), "checkpoint": {"every": 0}}
        recipe = write_recipe(rewards=[judge | reward], **settings)
        loop = build_loop(load_recipe(recipe), resume=resume, allow_changed_recipe=resume, quiet=True)
        run_loop(loop, resume=resume, command="")
        return folder

    return run


def reported_in_full(folder: Path) -> list[dict[str, float]]:
    """What the steps say."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reported(folder: Path) -> list[dict[str, float]]:
    """What the steps say, without what takes time and what asking again changes."""
    passing = ("time/", "step_time", "memory/", "rewards/judge/latency", "rewards/judge/retries")
    return [
        {key: value for key, value in row.items() if not key.startswith(passing)} for row in reported_in_full(folder)
    ]


def weights_of(folder: Path) -> bytes:
    """The trained model's file."""
    return (folder / "model" / "model.safetensors").read_bytes()
