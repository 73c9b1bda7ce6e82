"""Finished runs side by side: figures, means with intervals, each method's best learning rate, and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dar.compare.runs import Outcome
from dar.files.atomic import written
from dar.report.statistics import mean_interval
from dar.run.folder import RunFolder
from dar.shown import one_line

FIGURES = {
    "reward": "eval/reward",
    "kl_ref": "eval/kl/ref",
    "length": "eval/completions/mean_length",
    "missing_eos": "eval/completions/clipped_ratio",
    "entropy": "eval/entropy",
}
"""What the held-out prompts say at the end, by its name in comparison.json."""


_MEASURED = (*FIGURES, "kl_old_per_step", "seconds")


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What comparison.json holds: every run's figures and curve, and means with 95 % intervals.

    `tried` has the means of each method at each learning rate, `methods` those of the rate at which a method's
    held-out reward is the highest; a rate at which an alert ended a run comes after those at which none did.
    """
    runs = [_figures(outcome) for outcome in outcomes if outcome.is_finished]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["learning_rate"]), []).append(run)
    tried = [_means(group) for group in groups.values()]
    methods: dict[str, dict[str, Any]] = {}
    for row in tried:
        name = row["method"]
        if name not in methods or _merit(row) > _merit(methods[name]):
            methods[name] = row
    failed = [
        {
            "method": outcome.arm.name,
            "learning_rate": outcome.learning_rate,
            "seed": outcome.seed,
            "error": outcome.error,
        }
        for outcome in outcomes
        if not outcome.is_finished
    ]
    return {"methods": methods, "tried": tried, "runs": runs, "failed": failed}


def _merit(row: dict[str, Any]) -> tuple[bool, float]:
    return row["num_stopped"] == 0, row["reward"]["mean"]


def _means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one method at one learning rate."""
    # A run that was stopped before its first step has fewer figures than its neighbors.
    keys = [key for key in _MEASURED if all(key in run for run in runs)]
    return {
        "method": runs[0]["method"],
        "learning_rate": runs[0]["learning_rate"],
        "num_runs": len(runs),
        "num_stopped": sum(run["stopped_by"] is not None for run in runs),
    } | {key: _interval([run[key] for run in runs]) for key in keys}


def _figures(outcome: Outcome) -> dict[str, Any]:
    rows = RunFolder(outcome.folder).metrics()
    evaluations = [row for row in rows if "eval/reward" in row]
    steps = [row for row in rows if "loss" in row]
    final = evaluations[-1]
    found: dict[str, Any] = {
        "method": outcome.arm.name,
        "learning_rate": outcome.learning_rate,
        "seed": outcome.seed,
        "folder": str(outcome.folder),
    }
    found |= {name: float(final[key]) for name, key in FIGURES.items() if key in final}
    old = [row["kl/old_k3"] for row in steps if "kl/old_k3" in row]
    if old:
        found["kl_old_per_step"] = math.fsum(old) / len(old)
    found["seconds"] = math.fsum(row["step_time"] for row in steps)
    found["stopped_by"] = outcome.stopped_by and asdict(outcome.stopped_by)
    found["curve"] = [
        {"step": row["step"], "reward": row["eval/reward"], "kl_ref": row.get("eval/kl/ref")} for row in evaluations
    ]
    return found


def _interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and half the width of its 95 % confidence interval where there is more than one value."""
    found = mean_interval(values)
    return {"mean": found.mean} | ({} if found.half_width is None else {"half_width": found.half_width})


@rc_context({"text.parse_math": False})
def plot_frontier(summary: dict[str, Any], target: Path) -> None:
    """Held-out reward against KL to π₀, one line per run from the start to its end, as a PNG.

    Each method stands there at its best learning rate.
    KL stands on a square-root axis, on which the reward of KL-efficient methods is nearly a straight line (Gao et al.
    2022, arXiv:2210.10760).
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    names = list(summary["methods"])
    labelled = set[str]()
    for run in summary["runs"]:
        points = [(point["kl_ref"], point["reward"]) for point in run["curve"] if point["kl_ref"] is not None]
        if not points:
            continue
        name = run["method"]
        if run["learning_rate"] != summary["methods"][name]["learning_rate"]:
            continue
        index = names.index(name)
        look: dict[str, Any] = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        roots = [math.sqrt(max(kl, 0.0)) for kl, _ in points]
        rewards = [reward for _, reward in points]
        label = None if name in labelled else one_line(name, 60)
        axes.plot(roots, rewards, **look, alpha=0.6, linewidth=1.2, label=label)
        axes.plot(roots[-1], rewards[-1], "o", color=look["color"])
        if label is not None:
            axes.annotate(
                label, (roots[-1], rewards[-1]), (5, -3), textcoords="offset points", fontsize=8, color=look["color"]
            )
        labelled.add(name)
    ticks = [tick for tick in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if math.sqrt(tick) <= axes.get_xlim()[1]]
    axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("KL(π‖π₀) on held-out prompts, nats per completion (square-root axis)")
    axes.set_ylabel("held-out reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    with written(target) as scratch:
        figure.savefig(scratch, dpi=150)
