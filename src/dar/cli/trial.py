"""What `dar plan --try` shows of a step that was really taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dar.console import Console, about, new_table
from dar.shown import one_line

if TYPE_CHECKING:
    from dar.assembly.trial import Trial
    from dar.config.run import RunSpec


def show_trial(console: Console, spec: RunSpec, found: Trial) -> None:
    """The first prompt, its completions with what they earned, and what the step and the run take."""
    console.print(f"The first prompt, as the model reads it:\n{found.prompt}\n", soft_wrap=True)
    names = [name for name in found.completions[0] if name.startswith("reward/")]
    names += ["reward"] if names else []
    headings = [name.removeprefix("reward/") for name in names]
    table = new_table("its completions", "completion", "ends by", *headings, is_text=True)
    for row in found.completions:
        values = [f"{row[name]:.3g}" for name in names]
        table.add_row(one_line(row["completion"], 300), row["finish_reason"], *values)
    console.print(table)
    phases = [(key.removeprefix("time/"), seconds) for key, seconds in found.step.items() if key.startswith("time/")]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases)
    console.print(f"this step: {found.step['step_time']:.1f} s ({parts}), the first being the slowest", soft_wrap=True)
    others = f" and {found.num_evaluations} evaluations of {about(found.evaluation_seconds)}"
    console.print(
        f"the run: about {about(found.run_seconds)} ({spec.steps} steps{others if found.num_evaluations else ''}), "
        f"{found.memory_gb:.2g} GB of memory at the peak so far, {found.disk_gb:.2g} GB of disk",
        soft_wrap=True,
    )
