"""What `dar plan --try` shows of a step that was really taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from dar.console import Console
from dar.shown import one_line

if TYPE_CHECKING:
    from dar.assembly.trial import Trial
    from dar.config.run import RunSpec


def show_trial(console: Console, spec: RunSpec, found: Trial) -> None:
    """The first prompt, its completions with what they earned, and what the step and the run take."""
    console.print(f"The first prompt, as the model reads it:\n{found.prompt}\n", soft_wrap=True)
    table = Table(title="its completions", title_justify="left")
    names = [name for name in found.completions[0] if name.startswith("reward/")]
    for name in ("completion", "ends by", *names, "reward"):
        table.add_column(name.removeprefix("reward/"), justify="left" if name in ("completion", "ends by") else "right")
    for row in found.completions:
        values = [f"{row[name]:.3g}" for name in (*names, "reward")]
        table.add_row(one_line(row["completion"], 300), row["finish_reason"], *values)
    console.print(table)
    phases = [(key.removeprefix("time/"), seconds) for key, seconds in found.step.items() if key.startswith("time/")]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases)
    console.print(f"this step: {found.step['step_time']:.1f} s ({parts}), the first being the slowest", soft_wrap=True)
    others = f" and {found.num_evaluations} evaluations of {_time(found.evaluation_seconds)}"
    console.print(
        f"the run: about {_time(found.run_seconds)} ({spec.steps} steps{others if found.num_evaluations else ''}), "
        f"{found.memory_gb:.2g} GB of memory at the peak so far, {found.disk_gb:.2g} GB of disk",
        soft_wrap=True,
    )


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
