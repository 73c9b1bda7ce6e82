"""What came out of a run: held-out figures before and after, with intervals over the held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import fmean

from dar.record.intervals import Estimate, mean_interval, paired_difference
from dar.record.measures import MEASURES, Measure, measures_of
from dar.report.kinds import CompletionFile, Run, Training


@dataclass(frozen=True)
class Change:
    """A measure before and after training. change: over the held-out prompts, paired; None where it is not known."""

    measure: Measure
    before: float | None
    after: float
    change: Estimate | None


def changes(run: Run) -> list[Change]:
    """Every held-out measure at the first evaluation and at the last; empty without any."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    is_pair = first["step"] != last["step"]
    return [
        Change(
            measure,
            first.get(measure.key) if is_pair else None,
            last[measure.key],
            paired_difference(*(prompt_means(run.heldout_file(row["step"]), measure) for row in (first, last)))
            if is_pair
            else None,
        )
        for measure in measures_of(last)
    ]


def prompt_means(file: CompletionFile | None, measure: Measure) -> dict[Hashable, float]:
    """Each held-out prompt's mean of a measure over its completions; empty where no table has it.

    A prompt is its row in the data and its text, so that only the same prompts are ever put side by side.
    """
    if file is None or measure.column is None:
        return {}
    table = file.read(["position", "prompt", measure.column])
    if measure.column not in table.column_names:
        return {}
    values: dict[Hashable, list[float]] = {}
    for position, prompt, cell in zip(*(table[name].to_pylist() for name in ("position", "prompt", measure.column))):
        value = math.nan if cell is None else float(cell == "length" if isinstance(cell, str) else cell)
        if math.isfinite(value):  # NaN where a reward does not apply
            values.setdefault((position, prompt), []).append(value)
    return {prompt: fmean(found) for prompt, found in values.items()}


def final_prompt_rewards(run: Training) -> dict[Hashable, float]:
    """Mean reward of each held-out prompt at the last evaluation whose completions were recorded."""
    files = [file for file in run.completions if file.is_heldout]
    return prompt_means(files[-1] if files else None, MEASURES[0])


def evaluation_intervals(run: Training, measure: Measure) -> dict[int, Estimate]:
    """By step: the mean over the held-out prompts with its interval, where the completions are there."""
    means = {row["step"]: prompt_means(run.heldout_file(row["step"]), measure) for row in run.evaluations}
    return {step: mean_interval(list(found.values())) for step, found in means.items() if found}


def training_change(run: Run) -> tuple[float, float, int] | None:
    """(first, last, width): mean training reward over the first and last `width` steps, a tenth of them; or None."""
    rewards = run.series("reward")[1]
    if not rewards:
        return None
    width = max(1, len(rewards) // 10)
    return fmean(rewards[:width]), fmean(rewards[-width:]), width
