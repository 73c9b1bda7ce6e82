"""Ratios of denoising steps: where they lie, how far they spread and what the clip cuts, before and after RatioNorm."""

from __future__ import annotations

import math
from statistics import fmean

from dar.report.plots import Axis, Heatmap, Plot, Series
from dar.report.run import Run

_STEP = Axis("denoising step", is_whole=True)
_RANGES = Axis("log-ratio in clip ranges")
_HISTOGRAM = "Share of the images in each bin; between −1 and 1 nothing is clipped."
_NAMES = {"plain": "plain ratio", "used": "normalised ratio"}


def ratio_plots(run: Run) -> list[Plot]:
    """What there is to see of them, pooled over the training steps; empty for a method that has none."""
    keys = max(({key for key in row if key.startswith("ratio/")} for row in run.steps), key=len, default=set())
    rows = [row for row in run.steps if keys <= row.keys()]
    steps = [step for step in range(len(keys)) if f"ratio/step_{step}/plain/mean" in keys]
    edges = sorted((key.rpartition("_")[2] for key in keys if key.startswith("ratio/step_0/plain/from_")), key=float)
    spread, outside, maps = list[Series](), list[Series](), list[Plot]()
    kinds = [kind for kind in _NAMES if f"ratio/step_0/{kind}/mean" in keys]
    for color, (kind, name) in enumerate((kind, _NAMES[kind]) for kind in kinds):
        means, squares, *bins = (
            [fmean(row[f"ratio/step_{step}/{kind}/{what}"] for row in rows) for step in steps]
            for what in ("mean", "mean_square", *(f"from_{edge}" for edge in edges))
        )
        half = [math.sqrt(max(square - mean**2, 0.0)) for mean, square in zip(means, squares)]
        low, high = ([mean + sign * width for mean, width in zip(means, half)] for sign in (-1, 1))
        spread.append(Series(name, steps, means, color, "line+points", low=low, high=high, is_band=True))
        cut = {"above": bins[edges.index("1") :], "below": bins[: edges.index("-1")]}
        for place, (side, parts) in enumerate(cut.items()):
            outside.append(Series(f"{name}, {side}", steps, [sum(at) for at in zip(*parts)], color + 2 * place))
        labels = [f"< {edges[1]}", *(f"≥ {edge}" for edge in edges[1:])]
        heatmap = Heatmap(steps, [label.replace("-", "−") for label in labels], bins, "share")
        maps.append(Plot(f"ratio_{kind}", f"Histograms, {name}", _STEP, _RANGES, heatmap=heatmap, note=_HISTOGRAM))
    note = "Mean of its logarithm over the images of all training steps, at each one's last update, ± one deviation."
    sides = "Share of the images: above, a positive advantage has no effect any more; below, a negative one."
    lines = [
        Plot("ratio_spread", "Ratio", _STEP, Axis("log-ratio"), spread, note=note),
        Plot("ratio_outside", "Outside the clip range", _STEP, Axis("share", is_share=True), outside, note=sides),
    ]
    return [*lines, *maps] if keys else []
