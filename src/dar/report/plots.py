"""What a plot is, whoever draws it: the page in the browser, or matplotlib for a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#6A6A6A")
"""Okabe and Ito's colors, told apart by people of every color vision, their yellow and black darkened and lightened."""

_SQRT_TICKS = (0.01, 0.05, 0.1, 0.25, 0.5, *(2.0**power for power in range(14)))

Number = int | float


@dataclass(frozen=True)
class Axis:
    """title: with the unit. scale: `sqrt` draws √x and labels it with x (values below 0 stand at 0).

    is_whole: it counts, and a tick between two whole numbers would mean nothing.
    """

    title: str
    scale: Literal["linear", "sqrt"] = "linear"
    is_share: bool = False
    is_whole: bool = False


@dataclass(frozen=True)
class Series:
    """One line, set of points or stack of bars.

    color: index into the palette, the dashes and the markers, each taken round: lines differ in more than color. Points
        are joined thinly, for nothing was measured between them.
    low, high: of error bars, or of a band where `is_band`.
    in_legend: False for a line that another one stands for.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    color: int = 0
    style: Literal["line", "points", "line+points", "bars"] = "line"
    is_faint: bool = False
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    is_band: bool = False
    in_legend: bool = True


@dataclass(frozen=True)
class Heatmap:
    """z: [rows of y][columns of x] shares; rows from the lowest up."""

    x: Sequence[Number]
    y: Sequence[str]
    z: Sequence[Sequence[float]]
    label: str


@dataclass(frozen=True)
class Plot:
    """name: of its element and its PNG. note: the caption, one or two sentences. marks: steps with an alert."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    heatmap: Heatmap | None = None
    note: str = ""
    marks: Sequence[int] = ()

    def x_ticks(self) -> list[float]:
        """Where a square-root axis is labelled: 0, and from the largest down what does not touch its neighbour."""
        if self.x.scale != "sqrt":
            return []
        top = math.sqrt(max((value for series in self.series for value in series.x), default=0.0) or 0.01)
        room = 0.07 * top
        found: list[float] = []
        for tick in sorted(_SQRT_TICKS, reverse=True):
            place = math.sqrt(tick)
            if room <= place <= 1.02 * top and (not found or math.sqrt(found[-1]) - place >= room):
                found.append(tick)
        return [0.0, *found[::-1]]

    def record(self) -> dict[str, Any]:
        """As plain data, with the ticks of a square-root axis."""
        return {**asdict(self), "ticks": self.x_ticks()}


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to width − 1 before it."""
    ends, sums = np.arange(1, len(values) + 1), np.cumsum([0.0, *values])
    starts = np.maximum(ends - width, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def thinned(length: int, limit: int) -> list[int]:
    """At most `limit` indices of `length`, evenly spread, the first and the last among them."""
    return np.linspace(0, length - 1, min(length, limit)).round().astype(int).tolist()
