"""Finished runs side by side: figures, means with intervals, each method's best learning rate, and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dar.compare.runs import Outcome
from dar.record.intervals import mean_interval
from dar.record.measures import BY_KEY, KL_OLD, Measure
from dar.report.comparison import RecipeRuns, frontier
from dar.report.png import write_picture
from dar.report.run import load_run
from dar.shown import one_line

MEASURED = {
    "reward": BY_KEY["reward"],
    "gold": BY_KEY["gold"],
    "kl_ref": BY_KEY["kl/ref"],
    "kl_old_per_step": KL_OLD,
    "length": BY_KEY["completions/mean_length"],
    "missing_eos": BY_KEY["completions/clipped_ratio"],
    "entropy": BY_KEY["entropy"],
    "seconds": Measure("seconds", "min", ".1f"),
}
"""By their names in comparison.json: what the held-out prompts say at the end, and what is of the training steps."""


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What comparison.json holds: every run's figures and curve, and means with 95 % intervals.

    `tried` has the means of each method at each learning rate, `methods` those of the rate at which a method's
    `chosen_by` is the highest: `gold`, which nothing is trained on, where the recipe has `evaluation.rewards`, else
    `reward`. A rate at which an alert ended a run comes after those at which none did.
    """
    runs = [_figures(outcome) for outcome in outcomes if outcome.is_finished]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["learning_rate"]), []).append(run)
    tried = [_means(group) for group in groups.values()]
    chosen_by = "gold" if tried and all("gold" in row for row in tried) else "reward"

    def merit(row: dict[str, Any]) -> tuple[bool, float]:
        return row["num_stopped"] == 0, row[chosen_by]["mean"]

    methods: dict[str, dict[str, Any]] = {}
    for row in tried:
        name = row["method"]
        if name not in methods or merit(row) > merit(methods[name]):
            methods[name] = row
    failed = [_named(outcome) | {"error": outcome.error} for outcome in outcomes if not outcome.is_finished]
    return {"chosen_by": chosen_by, "methods": methods, "tried": tried, "runs": runs, "failed": failed}


def _means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one method at one learning rate."""
    # A run that was stopped before its first step has fewer figures than its neighbors.
    keys = [key for key in MEASURED if all(key in run for run in runs)]
    return {
        "method": runs[0]["method"],
        "learning_rate": runs[0]["learning_rate"],
        "num_runs": len(runs),
        "num_stopped": sum(run["stopped_by"] is not None for run in runs),
    } | {key: _interval([run[key] for run in runs]) for key in keys}


def _named(outcome: Outcome) -> dict[str, Any]:
    return {"method": outcome.arm.name, "learning_rate": outcome.learning_rate, "seed": outcome.seed}


def _figures(outcome: Outcome) -> dict[str, Any]:
    run = load_run(outcome.folder)
    final, old = run.evaluations[-1], run.series("kl/old_k3")[1]
    figures = {name: float(final[measure.key]) for name, measure in MEASURED.items() if measure.key in final}
    return {
        **_named(outcome),
        "folder": str(outcome.folder),
        **figures,
        **({"kl_old_per_step": fmean(old)} if old else {}),
        "seconds": math.fsum(run.series("step_time")[1]),
        "stopped_by": outcome.stopped_by and asdict(outcome.stopped_by),
        "curve": [
            {"kl_ref": row.get("kl/ref")} | {key: row[key] for key in ("step", "reward", "gold") if key in row}
            for row in run.evaluations
        ],
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and half the width of its 95 % confidence interval where there is more than one value."""
    found = mean_interval(values)
    return {"mean": found.mean} | ({} if found.half_width is None else {"half_width": found.half_width})


def write_frontier(summary: dict[str, Any], target: Path) -> bool:
    """Held-out reward against KL to π₀ as a PNG, each method at its best learning rate; False without such figures."""
    chosen = [
        RecipeRuns(
            one_line(name, 60),
            tuple(
                load_run(run["folder"])
                for run in summary["runs"]
                if (run["method"], run["learning_rate"]) == (name, row["learning_rate"])
            ),
        )
        for name, row in summary["methods"].items()
    ]
    plot = frontier(chosen)
    if plot is None:
        return False
    write_picture(plot, target)
    return True
