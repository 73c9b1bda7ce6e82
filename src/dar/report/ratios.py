"""Ratios of denoising steps: where they lie, how far they spread and what the clip cuts, before and after RatioNorm."""

from __future__ import annotations

import math
from statistics import fmean

from dar.report.kinds import Run
from dar.report.plots import Axis, Heatmap, Plot, Series

_STEP = Axis("denoising step", is_whole=True)
_RANGES = Axis("log-ratio in clip ranges")
_SPREAD = "Mean of its logarithm over the images of all training steps, at each one's last update, ± one deviation."
_CLIPPED = (
    "Share of the images that no longer count: above the range with a positive advantage, below with a negative one."
)
_HISTOGRAM = "Share of the images in each bin; between −1 and 1 nothing is clipped."


def ratio_plots(run: Run) -> list[Plot]:
    """What there is to see of them, pooled over the training steps; empty for a method that has none."""
    keys = max(({key for key in row if key.startswith("ratio/")} for row in run.steps), key=len, default=set())
    rows = [row for row in run.steps if keys <= row.keys()]
    steps = [step for step in range(len(keys)) if f"ratio/step_{step}/plain/mean" in keys]
    edges = sorted((key.rpartition("_")[2] for key in keys if key.startswith("ratio/step_0/plain/from_")), key=float)
    spread, clips, maps = list[Series](), list[Series](), list[Plot]()
    kinds = [kind for kind in ("plain", "centered", "normalized") if f"ratio/step_0/{kind}/mean" in keys]
    for color, kind in enumerate(kinds):
        means, squares, clipped, *bins = (
            [fmean(row[f"ratio/step_{step}/{kind}/{what}"] for row in rows) for step in steps]
            for what in ("mean", "mean_square", "clipped", *(f"from_{edge}" for edge in edges))
        )
        half = [math.sqrt(max(square - mean**2, 0.0)) for mean, square in zip(means, squares)]
        low, high = ([mean + sign * width for mean, width in zip(means, half)] for sign in (-1, 1))
        spread.append(Series(kind, steps, means, color, "line+points", low=low, high=high, is_band=True))
        clips.append(Series(kind, steps, clipped, color, "line+points"))
        labels = [f"< {edges[1]}", *(f"≥ {edge}" for edge in edges[1:])]
        heatmap = Heatmap(steps, [label.replace("-", "−") for label in labels], bins, "share")
        maps.append(Plot(f"ratio_{kind}", f"Histograms, {kind}", _STEP, _RANGES, heatmap=heatmap, note=_HISTOGRAM))
    lines = [
        Plot("ratio_spread", "Ratio", _STEP, Axis("log-ratio"), spread, note=_SPREAD),
        Plot("ratio_clipped", "Clipped", _STEP, Axis("share", is_share=True), clips, note=_CLIPPED),
    ]
    return [*lines, *maps] if keys else []
