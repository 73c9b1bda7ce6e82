"""Several runs side by side: which belong together, their final figures, their frontier and who beats whom."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dar.config.recipe import flatten
from dar.record.intervals import Estimate, WinShare, mean_interval, win_share
from dar.record.measures import BY_KEY, MEASURES, Measure
from dar.report.curves import KL_AXIS, STEP, Curve
from dar.report.kinds import ControlRun, RecordedRun, Run
from dar.report.plots import Axis, Plot, Series
from dar.report.results import final_prompt_rewards
from dar.shown import one_line

_SAME_ANYWAY = ("seed", "output_dir", "alerts", "checkpoint.", "logging.", "runtime.")
_SEED = re.compile(r"(.+)-seed\d+")


@dataclass(frozen=True)
class RecipeRuns:
    """Runs of one recipe that differ in the seed alone."""

    name: str
    runs: tuple[Run, ...] | tuple[ControlRun, ...]


COLUMNS = (
    *(measure for measure in MEASURES if measure.key != "completions/distinct_2"),
    Measure("return", "return", ",.1f"),
    Measure("return_mean", "mean over perturbations", ",.1f"),
    Measure("return_worst", "worst perturbation", ",.1f"),
    Measure("rank", "mean rank", ".1f"),
    Measure("seconds", "time", "duration"),
)
"""The figures of a finished run: of its last evaluation, and of all its training steps."""


def arms_of(runs: Sequence[Run] | Sequence[ControlRun]) -> list[RecipeRuns]:
    """Groups runs whose recipes are the same but for the seed (and what changes no number), in the order given.

    An arm is called as `dar compare` called it (`NAME-seedN`), else after its method and what sets it apart.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Any]] = {}
    for run in runs:
        # Of a foreign run the settings are not known, so that nothing is its like.
        alike = {"path": str(run.path)} if isinstance(run, RecordedRun) and run.reasons else _settings(run)
        groups.setdefault(tuple(sorted(alike.items())), []).append(run)
    settings = [_settings(group[0]) for group in groups.values()]
    names = [_name(group, mine, settings) for mine, group in zip(settings, groups.values(), strict=True)]
    # The same name twice would be one line of a legend for two things.
    taken = [
        name if names.count(name) == 1 else f"{name} ({group[0].name})" for name, group in zip(names, groups.values())
    ]
    return [RecipeRuns(one_line(name, 150), tuple(group)) for name, group in zip(taken, groups.values(), strict=True)]


def final_figures(arm: RecipeRuns) -> dict[str, Estimate]:
    """By a column's key: mean over the runs at their last evaluation, with Student's interval over seeds."""
    runs = [
        (run.evaluations[-1] if run.evaluations else {})
        | ({} if (seconds := run.total("step_time")) is None else {"seconds": seconds})
        for run in arm.runs
    ]
    keys = [column.key for column in COLUMNS if all(column.key in run for run in runs)]
    return {key: mean_interval([run[key] for run in runs]) for key in keys}


def frontier(arms: Sequence[RecipeRuns], key: str = "reward") -> Plot | None:
    """Held-out reward, or `gold`, against √KL, a line per method, the range over its seeds as a band; None without."""
    series = []
    for color, arm in enumerate(arms):
        points = _over_seeds(arm, ("kl/ref", key))
        if not points:
            continue
        kls, rewards = zip(*(point for _, point in points))
        if len(arm.runs) > 1:
            for run in arm.runs:
                rows = [row for row in run.evaluations if "kl/ref" in row and key in row]
                kl, reward = [row["kl/ref"] for row in rows], [row[key] for row in rows]
                series.append(Series(run.name, kl, reward, color, is_faint=True, in_legend=False))
        series.append(with_band(arm, color, [fmean(values) for values in kls], rewards))
    if not series:
        return None
    return Plot(
        "frontier" if key == "reward" else f"frontier_{key}",
        f"{BY_KEY[key].label.capitalize()} for drift",
        KL_AXIS,
        Axis(f"held-out {BY_KEY[key].name}"),
        series,
        note="Each point is a held-out evaluation, mean over seeds; the band goes from the lowest to the highest seed. "
        "Higher at the same KL is better. On this axis the reward of KL-efficient methods is nearly a straight line.",
    )


def over_steps(arms: Sequence[RecipeRuns], curve: Curve) -> Plot | None:
    """A held-out metric by step, one line per method, the range over its seeds as a band."""
    series = []
    for color, arm in enumerate(arms):
        if points := _over_seeds(arm, (curve.key,)):
            series.append(with_band(arm, color, [step for step, _ in points], [point[0] for _, point in points]))
    note = "Held-out prompts; mean over seeds, and their range."
    return Plot(curve.name, curve.title, STEP, curve.axis, series, note=note) if series else None


def win_matrix(arms: Sequence[RecipeRuns]) -> list[list[WinShare | None]]:
    """[row][column]: on which share of the shared held-out prompts the row's mean reward beats the column's.

    A prompt's reward is its mean over completions and seeds at the end of training. None on the diagonal, and where
    two methods share no prompt.
    """
    rewards = [_prompt_rewards(arm) for arm in arms]
    return [
        [None if row == column else win_share(rewards[row], rewards[column]) for column in range(len(arms))]
        for row in range(len(arms))
    ]


def _settings(run: Run | ControlRun) -> dict[str, str]:
    return {key: repr(value) for key, value in flatten(run.spec).items() if not key.startswith(_SAME_ANYWAY)}


def _name(group: Sequence[Run] | Sequence[ControlRun], mine: dict[str, str], everyone: Sequence[dict[str, str]]) -> str:
    matches = [_SEED.fullmatch(run.name) for run in group]
    given = {match[1] for match in matches if match}
    if all(matches) and len(given) == 1:
        return given.pop()
    if isinstance(group[0], ControlRun):
        return group[0].method
    if isinstance(group[0], RecordedRun):
        return group[0].name  # which of its settings matter is not known
    method = group[0].method
    others = [settings for settings in everyone if settings.get("algorithm.type") == mine["algorithm.type"]]
    apart = [key for key in mine if key != "algorithm.type" and len({other.get(key) for other in others}) > 1]
    return f"{method}, " + ", ".join(f"{key.rpartition('.')[2]} {mine[key]}" for key in apart[:3]) if apart else method


def _over_seeds(arm: RecipeRuns, keys: tuple[str, ...]) -> list[tuple[int, tuple[list[float], ...]]]:
    """(step, each key's values over the seeds), at the steps where every run of the arm has been evaluated."""
    by_step = [{row["step"]: row for row in run.evaluations if all(key in row for key in keys)} for run in arm.runs]
    shared = [step for step in by_step[0] if all(step in rows for rows in by_step)]
    return [(step, tuple([rows[step][key] for rows in by_step] for key in keys)) for step in shared]


def with_band(arm: RecipeRuns, color: int, x: Sequence[float], values: Sequence[Sequence[float]]) -> Series:
    several = len(arm.runs) > 1
    seeds = f" ({len(arm.runs)} seeds)" if several else ""
    return Series(
        arm.name + seeds,
        x,
        [fmean(found) for found in values],
        color,
        "line+points",
        low=[min(found) for found in values] if several else None,
        high=[max(found) for found in values] if several else None,
        is_band=True,
    )


def _prompt_rewards(arm: RecipeRuns) -> dict[Hashable, float]:
    """Each prompt's mean reward over the arm's runs, where all of them have it."""
    runs = [final_prompt_rewards(run) for run in arm.runs]
    shared = [prompt for prompt in runs[0] if all(prompt in rewards for rewards in runs)]
    return {prompt: fmean([rewards[prompt] for rewards in runs]) for prompt in shared}
