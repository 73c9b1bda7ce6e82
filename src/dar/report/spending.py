"""Where the time and the tokens of a run went."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dar.report.kinds import Training

PHASES = {
    "rollout": "sampling", "reward": "scoring", "reference": "reference", "critic": "critic", "update": "update",
    "diagnostics": "diagnostics", "heldout": "held-out evaluation", "rest": "rest of the steps",
    "idle": "waiting for samples",
}  # fmt: skip
"""What people are shown for `time/<phase>`, in the order of a step; the place of a phase is its color everywhere."""


@dataclass(frozen=True)
class Spending:
    """Totals over the recorded steps.

    phases: (phase, seconds, share of the whole) in falling order; phases that overlap add up to more than the whole.
    seconds: all training steps and held-out evaluations.
    steps: the seconds of the training steps alone.
    prompt_tokens, completion_tokens: trained on, each prompt counted once.
    rollout_speed: completion tokens per second of sampling, or None where nothing is sampled, or beside the learning.
    peak_gb: peak resident memory, 10⁹ bytes.
    """

    phases: list[tuple[str, float, float]]
    seconds: float
    steps: float
    prompt_tokens: float | None
    completion_tokens: float | None
    rollout_speed: float | None
    peak_gb: float | None


def spending(run: Training) -> Spending | None:
    """Sums of the run's own timings; None where no step has one."""
    steps = run.total("step_time")
    if steps is None:
        return None
    evaluation = math.fsum(row.get("time", 0.0) for row in run.evaluations)
    names = sorted({key for row in run.steps for key in row if key.startswith("time/")})
    seconds = {name.removeprefix("time/"): run.total(name) or 0.0 for name in names}
    rest = steps - math.fsum(seconds.values())
    if rest > 0:
        seconds["rest"] = rest
    if evaluation > 0:
        seconds["heldout"] = evaluation
    whole = steps + evaluation
    completion = run.total("tokens/completion")
    rollout = None if "idle" in seconds else seconds.get("rollout")
    return Spending(
        phases=sorted(
            ((name, value, value / whole if whole else 0.0) for name, value in seconds.items()),
            key=lambda phase: -phase[1],
        ),
        seconds=whole,
        steps=steps,
        prompt_tokens=run.total("tokens/prompt"),
        completion_tokens=completion,
        rollout_speed=completion / rollout if completion and rollout else None,
        peak_gb=max((row["memory/peak_gb"] for row in run.steps if "memory/peak_gb" in row), default=None),
    )
