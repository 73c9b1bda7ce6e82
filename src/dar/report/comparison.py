"""Several runs side by side: which belong together, their final figures, their frontier and who beats whom."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dar.config.recipe import flatten
from dar.report.curves import KL_AXIS, STEP
from dar.report.plots import Axis, Plot, Series
from dar.report.results import final_prompt_rewards
from dar.report.run import Run
from dar.report.statistics import Estimate, Share, mean_interval, win_share
from dar.report.text import Form
from dar.shown import one_line

_SAME_ANYWAY = ("seed", "output_dir", "alerts", "checkpoint.", "logging.", "runtime.")
_SEED = re.compile(r"(.+)-seed\d+")


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe that differ in the seed alone."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Column:
    """A figure of a finished run. key: of its last evaluation; None: seconds of its training steps."""

    label: str
    form: Form
    key: str | None


COLUMNS = (
    Column("reward", "signed", "reward"),
    Column("gold reward", "signed", "gold"),
    Column("KL to π₀, nats", "plain", "kl/ref"),
    Column("length, tokens", "tokens", "completions/mean_length"),
    Column("no EOS", "share", "completions/clipped_ratio"),
    Column("entropy, nats", "plain", "entropy"),
    Column("time", "seconds", None),
)


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Groups runs whose recipes are the same but for the seed (and what changes no number), in the order given.

    An arm is called as `dar compare` called it (`NAME-seedN`), else after its method and what sets it apart.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(_settings(run).items())), []).append(run)
    settings = [dict(key) for key in groups]
    names = [_name(group, mine, settings) for mine, group in zip(settings, groups.values(), strict=True)]
    # The same name twice would be one line of a legend for two things.
    taken = [
        name if names.count(name) == 1 else f"{name} ({group[0].name})" for name, group in zip(names, groups.values())
    ]
    return [Arm(one_line(name, 150), tuple(group)) for name, group in zip(taken, groups.values(), strict=True)]


def final_figures(arm: Arm) -> dict[str, Estimate]:
    """By a column's label: mean over the arm's runs at their last evaluation, with Student's interval over seeds."""
    found = {}
    for column in COLUMNS:
        values = [value for run in arm.runs if (value := _final(run, column)) is not None]
        if values and len(values) == len(arm.runs):
            found[column.label] = mean_interval(values)
    return found


def frontier(arms: Sequence[Arm]) -> Plot | None:
    """Held-out reward against √KL, one line per method, the range over its seeds as a band; None without such data."""
    series = []
    for color, arm in enumerate(arms):
        points = _over_seeds(arm, ("kl/ref", "reward"))
        if not points:
            continue
        kls, rewards = zip(*(point for _, point in points))
        if len(arm.runs) > 1:
            for run in arm.runs:
                rows = [row for row in run.evaluations if "kl/ref" in row]
                kl, reward = [row["kl/ref"] for row in rows], [row["reward"] for row in rows]
                series.append(Series(run.name, kl, reward, color, is_faint=True, in_legend=False))
        series.append(_with_band(arm, color, [_mean(values) for values in kls], rewards))
    if not series:
        return None
    return Plot(
        "frontier",
        "Reward for drift",
        KL_AXIS,
        Axis("held-out reward"),
        series,
        note="Each point is a held-out evaluation, mean over seeds; the band goes from the lowest to the highest seed. "
        "Higher at the same KL is better. On this axis the reward of KL-efficient methods is nearly a straight line.",
    )


def over_steps(arms: Sequence[Arm], key: str, name: str, title: str, axis: Axis) -> Plot | None:
    """A held-out metric by step, one line per method, the range over its seeds as a band."""
    series = []
    for color, arm in enumerate(arms):
        if points := _over_seeds(arm, (key,)):
            series.append(_with_band(arm, color, [step for step, _ in points], [point[0] for _, point in points]))
    return (
        Plot(name, title, STEP, axis, series, note="Held-out prompts; mean over seeds, and their range.")
        if series
        else None
    )


def win_matrix(arms: Sequence[Arm]) -> list[list[Share | None]]:
    """[row][column]: on which share of the shared held-out prompts the row's mean reward beats the column's.

    A prompt's reward is its mean over completions and seeds at the end of training. None on the diagonal, and where
    two methods share no prompt.
    """
    rewards = [_prompt_rewards(arm) for arm in arms]
    return [
        [None if row == column else win_share(rewards[row], rewards[column]) for column in range(len(arms))]
        for row in range(len(arms))
    ]


def _settings(run: Run) -> dict[str, str]:
    return {key: repr(value) for key, value in flatten(run.spec).items() if not key.startswith(_SAME_ANYWAY)}


def _name(group: Sequence[Run], mine: dict[str, str], everyone: Sequence[dict[str, str]]) -> str:
    matches = [_SEED.fullmatch(run.name) for run in group]
    given = {match[1] for match in matches if match}
    if all(matches) and len(given) == 1:
        return given.pop()
    method = group[0].spec.algorithm.type
    others = [settings for settings in everyone if settings["algorithm.type"] == mine["algorithm.type"]]
    apart = [key for key in mine if key != "algorithm.type" and len({other.get(key) for other in others}) > 1]
    return f"{method}, " + ", ".join(f"{key.rpartition('.')[2]} {mine[key]}" for key in apart[:3]) if apart else method


def _final(run: Run, column: Column) -> float | None:
    if column.key is None:
        return math.fsum(row.get("step_time", 0.0) for row in run.steps) or None
    return run.evaluations[-1].get(column.key) if run.evaluations else None


def _over_seeds(arm: Arm, keys: tuple[str, ...]) -> list[tuple[int, tuple[list[float], ...]]]:
    """(step, each key's values over the seeds), at the steps where every run of the arm has been evaluated."""
    by_step = [{row["step"]: row for row in run.evaluations if all(key in row for key in keys)} for run in arm.runs]
    shared = [step for step in by_step[0] if all(step in rows for rows in by_step)]
    return [(step, tuple([rows[step][key] for rows in by_step] for key in keys)) for step in shared]


def _with_band(arm: Arm, color: int, x: Sequence[float], values: Sequence[Sequence[float]]) -> Series:
    several = len(arm.runs) > 1
    seeds = f" ({len(arm.runs)} seeds)" if several else ""
    return Series(
        arm.name + seeds,
        x,
        [_mean(found) for found in values],
        color,
        "line+points",
        low=[min(found) for found in values] if several else None,
        high=[max(found) for found in values] if several else None,
        is_band=True,
    )


def _prompt_rewards(arm: Arm) -> dict[Hashable, float]:
    """Each prompt's mean reward over the arm's runs, where all of them have it."""
    runs = [final_prompt_rewards(run) for run in arm.runs]
    shared = [prompt for prompt in runs[0] if all(prompt in rewards for rewards in runs)]
    return {prompt: _mean([rewards[prompt] for rewards in runs]) for prompt in shared}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
