"""The weights of a regression method over the run: histogram, effective sample size, clip share, drift of w_reg."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dar.report.curves import STEP, Curve, plots_of
from dar.report.kinds import Run
from dar.report.plots import Axis, Heatmap, Plot, thinned

_DECADES = range(-3, 5)
EDGES = (0.0, *(mantissa * 10.0**decade for decade in _DECADES for mantissa in (1.0, 2.0, 5.0)))
"""Upper bounds of the histogram's bins: 0, 0.001, 0.002, 0.005, 0.01, …"""
MAX_COLUMNS = 400


CURVES = (
    Curve(
        "",
        "weight_shares",
        "Who teaches",
        Axis("share of the batch", is_share=True),
        "Effective sample size is (Σw)²/(B·Σw²): 25 % means that the update hangs on a quarter of the batch.",
        {
            "weights/ess_fraction": "effective sample size",
            "weights/clip_fraction": "at the clip",
            "weights/zero_fraction": "below 0.01",
            "rows/skipped_fraction": "left out of the update",
        },
    ),
    Curve(
        "",
        "w_reg",
        "Pull towards π₀",
        Axis("nats per completion"),
        "w_reg = (π₀/π_t)^α, and 0 means no pull. The mean of its logarithm is −α·KL(π_t‖π₀).",
        {"weights/log_w_reg_mean": "mean of log w_reg", "weights/neg_log_mean_w_reg": "− log of mean w_reg"},
    ),
)


def weight_plots(run: Run) -> list[Plot]:
    """What there is to see of the weights; empty for a method that has none of its own."""
    if not run.series("weights/ess_fraction")[0]:
        return []
    return [*filter(None, [histogram(run)]), *plots_of(run, CURVES)]


def histogram(run: Run) -> Plot | None:
    """Share of a step's completions in each bin of weight, over the steps whose completions were recorded."""
    files = [file for file in run.completions if not file.is_heldout]
    files = [files[index] for index in thinned(len(files), MAX_COLUMNS)]
    columns, steps = [], []
    for file in files:
        table = file.read(["weight"])
        if "weight" in table.column_names and table.num_rows:
            columns.append(binned(table["weight"].to_pylist()))
            steps.append(file.step)
    if not columns:
        return None
    used = [bin for bin in range(len(EDGES) + 1) if any(column[bin] for column in columns)]
    rows = range(used[0], used[-1] + 1)
    return Plot(
        "weights",
        "Weights",
        STEP,
        Axis("weight of a completion"),
        heatmap=Heatmap(steps, [bin_name(row) for row in rows], [[c[row] for c in columns] for row in rows], "share"),
        note="Share of the batch's completions, at the steps whose completions were recorded.",
    )


def binned(weights: Sequence[float]) -> list[float]:
    """Shares of the weights below EDGES[0], from EDGES[i] up to EDGES[i + 1], …, and from the last edge up."""
    # A weight is stored in fp32: 0.2 is then a hair more or less than the edge it stands on.
    places = np.digitize(np.multiply(weights, 1 + 1e-6), EDGES)
    return (np.bincount(places, minlength=len(EDGES) + 1) / len(weights)).tolist()


def bin_name(bin: int) -> str:
    """Where a bin begins; of the lowest two, weights below 0 and those that are hardly above, where it ends."""
    return f"< {EDGES[bin]:g}" if bin < 2 else f"≥ {EDGES[bin - 1]:g}"
