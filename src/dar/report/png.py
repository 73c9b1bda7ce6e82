"""The same plots as pictures, for papers: drawn by matplotlib from the same records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dar.files.atomic import written
from dar.report.kinds import AnyRuns
from dar.report.page import panels_of
from dar.report.plots import PALETTE, Axis, Number, Plot, Series

_SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#3f8fc4", "#00365c"])
_DASHES, _MARKERS = ("-", "--", ":", "-."), "oDs^vPX"


def write_pictures(runs: AnyRuns, folder: Path) -> list[Path]:
    """Writes every plot of the report as FOLDER/<name>.png. Raises as `dar.files.atomic.written`."""
    return [write_picture(plot, folder / f"{plot.name}.png") for panel in panels_of(runs) for plot in panel.plots]


# A name that holds two dollar signs is no formula.
@rc_context({"text.parse_math": False})
def picture(plot: Plot) -> Figure:
    """One plot as a figure of 6 × 4 inches."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    if plot.heatmap is not None:
        _heatmap(figure, axes, plot)
    else:
        base = [0.0] * max((len(series.x) for series in plot.series), default=0)
        for series in plot.series:
            if series.style == "bars":
                heights = [value or 0.0 for value in series.y]
                axes.bar(series.x, heights, bottom=base, width=0.9, color=_color(series), label=series.name)
                base = [low + high for low, high in zip(base, heights)]
            else:
                _line(axes, plot, series)
        _ticks(axes, plot)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False, handlelength=3)
        axes.grid(alpha=0.3)
    for step in plot.marks:
        axes.axvline(step, color="#8a4b00", linewidth=1, linestyle=":")
    axes.set_title(plot.title, fontsize=11, loc="left")
    axes.set_xlabel(plot.x.title)
    axes.set_ylabel(plot.y.title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_picture(plot: Plot, file: Path) -> Path:
    """Writes one plot, and returns where. Raises as `dar.files.atomic.written`."""
    with written(file) as scratch:
        picture(plot).savefig(scratch, dpi=200)
    return file


def _line(axes: Axes, plot: Plot, series: Series) -> None:
    x = _mapped(plot.x, series.x)
    y = [math.nan if value is None else value for value in series.y]
    axes.plot(
        x,
        y,
        color=_color(series),
        linestyle="" if series.style == "points" else _DASHES[series.color % len(_DASHES)],
        linewidth=1.6 if series.style == "line" and not series.is_faint else 0.8,
        marker="" if series.style == "line" else _MARKERS[series.color % len(_MARKERS)],
        markersize=5,
        alpha=0.4 if series.is_faint else 1.0,
        label=series.name if series.in_legend else None,
    )
    if series.low is None or series.high is None:
        return
    if series.is_band:
        axes.fill_between(x, series.low, series.high, color=_color(series), alpha=0.16, linewidth=0)
    else:
        below = [value - low for value, low in zip(y, series.low)]
        above = [high - value for value, high in zip(y, series.high)]
        axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=_color(series), elinewidth=1, capsize=2)


def _heatmap(figure: Figure, axes: Axes, plot: Plot) -> None:
    assert plot.heatmap is not None
    columns, rows = range(len(plot.heatmap.x)), range(len(plot.heatmap.y))
    mesh = axes.pcolormesh(columns, rows, plot.heatmap.z, cmap=_SHARES, vmin=0)
    every = math.ceil(len(columns) / 10)
    axes.set_xticks(columns[::every], [str(step) for step in plot.heatmap.x[::every]])
    axes.set_yticks(rows, plot.heatmap.y, fontsize=8)
    figure.colorbar(mesh, ax=axes, label=plot.heatmap.label, format=PercentFormatter(1))


def _ticks(axes: Axes, plot: Plot) -> None:
    for axis, drawn in (plot.x, axes.xaxis), (plot.y, axes.yaxis):
        if axis.is_share:
            drawn.set_major_formatter(PercentFormatter(1, decimals=0))
        if axis.is_whole:
            drawn.set_major_locator(MaxNLocator(integer=True))
    if plot.x.scale == "sqrt":
        ticks = plot.x_ticks()
        axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])


def _mapped(axis: Axis, values: Sequence[Number]) -> list[float]:
    return [math.sqrt(max(value, 0.0)) if axis.scale == "sqrt" else float(value) for value in values]


def _color(series: Series) -> str:
    return PALETTE[series.color % len(PALETTE)]
