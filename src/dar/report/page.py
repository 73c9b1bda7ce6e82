"""The page: one HTML file with everything in it, which asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dar import __version__
from dar.config.recipe import dump_recipe
from dar.record.folder import RunFolder
from dar.record.intervals import wilson
from dar.report.comparison import COLUMNS, arms_of, final_figures, frontier, over_steps, win_matrix
from dar.report.completions import browser_of
from dar.report.control import control_plots
from dar.report.curves import IN_COMPARISON, MAX_POINTS, overoptimization_plot, plots_of, time_plot, training_plots
from dar.report.kinds import AnyRuns, ControlRun, RecordedRun, RewardModelRun, Run, Training
from dar.report.missing import missing
from dar.report.plots import Plot, thinned
from dar.report.ratios import ratio_plots
from dar.report.results import changes, training_change
from dar.report.reward_model import CURVES, reliability
from dar.report.spending import PHASES, spending
from dar.report.text import count, difference, duration, number, script_json, spans
from dar.report.weights import weight_plots
from dar.shown import visible

_SCRIPTS = ("plot.js", "browser.js", "report.js")


@dataclass(frozen=True)
class Panel:
    """A section of plots, which the page leaves out where there are none."""

    id: str
    title: str
    plots: list[Plot]


def render_page(runs: AnyRuns, *, version: str | None = None) -> str:
    """The report of one run, of a reward model's training, or the comparison of several runs, as HTML.

    Args:
        runs: one or more runs, or a reward model's training.
        version: where the page is served and asks for news: what `/version` says of the state it shows. None for a
            file, which asks for nothing.
    """
    panels = panels_of(runs)
    if isinstance(runs, RewardModelRun):
        kind, found, context = "reward_model", [runs], single_context(runs)
    elif len(runs) == 1 and isinstance(runs[0], Run):
        kind, found, context = "run", runs, single_context(runs[0])
    else:
        kind, found, context = "comparison", runs, comparison_context(runs)
    browser = browser_of(found)
    data = {
        "plots": {plot.name: plot.record() for panel in panels for plot in panel.plots},
        "metrics": metric_columns(found[0]) if len(found) == 1 else {},
        "chunks": [{"id": c.id, "run": visible(c.run), "label": c.label, "rows": c.rows} for c in browser.chunks],
        "version": version,
    }
    scripts = [Markup(text) for text in (get_plotlyjs(), *map(_static, _SCRIPTS))]
    shared = {
        "runs": found,
        "panels": {panel.id: panel for panel in panels},
        "browser": browser,
        "data": Markup(script_json(data)),
        "scripts": scripts,
        "style": Markup(_static("report.css")),
        "policy": security_policy(scripts, is_served=version is not None),
        "dar_version": __version__,
    }
    return _templates().get_template(f"{kind}.html.j2").render(**shared, **context)


def security_policy(scripts: Sequence[str], *, is_served: bool) -> str:
    """The page's Content-Security-Policy: only these very scripts run, and nothing is loaded from anywhere.

    Styles are inline because plotly.js writes some; a served page may ask its own server for news.
    """
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'" for script in scripts
    )
    connect = "'self'" if is_served else "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def panels_of(runs: AnyRuns) -> list[Panel]:
    """The plots of whatever a page is of, by section."""
    if isinstance(runs, RewardModelRun):
        curves = plots_of(runs, CURVES)
        return [Panel("curves", "Training", curves), Panel("calibration", "Calibration", reliability(runs))]
    if len(runs) == 1 and isinstance(runs[0], Run):
        over, time = overoptimization_plot(runs[0]), time_plot(runs[0])
        return [
            Panel("curves", "Training", training_plots(runs[0])),
            Panel("overoptimization", "Proxy and gold", [over] if over else []),
            Panel("weights", "Weights", weight_plots(runs[0])),
            Panel("ratios", "Ratios of denoising steps", ratio_plots(runs[0])),
            Panel("time", "Time and tokens", [time] if time else []),
        ]
    arms = arms_of(runs)
    steps = [over_steps(arms, curve) for curve in IN_COMPARISON]
    frontiers = [frontier(arms, key) for key in ("reward", "gold")]
    return [
        Panel("frontier", "Frontier", [plot for plot in frontiers if plot]),
        Panel("curves", "Over the steps", [plot for plot in steps if plot]),
        Panel("control", "Perturbations and spectra", control_plots(arms)),
    ]


def metric_columns(run: Training) -> dict[str, Any]:
    """Every metric of the run by its name, but for those of histograms: the steps and values, thinned in a long run."""
    found: dict[str, Any] = {}
    for rows, prefix in ((run.steps, ""), (run.evaluations, "eval/")):
        kept = [rows[index] for index in thinned(len(rows), MAX_POINTS)]
        for key in sorted({key for row in kept for key in row if not key.startswith("ratio/")} - {"step"}):
            having = [row for row in kept if key in row]
            found[visible(prefix + key)] = [[row["step"] for row in having], [row[key] for row in having]]
    return found


def single_context(run: Run | RewardModelRun) -> dict[str, Any]:
    """What the template of one training reads beside the plots."""
    found = {
        "run": run,
        "spending": spending(run),
        "phase_names": PHASES,
        "recipe": visible(dump_recipe(run.spec)),
        "environment": visible(yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True)),
        "thinned_to": MAX_POINTS if len(run.steps) > MAX_POINTS else None,
    }
    if isinstance(run, Run):
        has_gold = any("gold" in row for row in run.evaluations)
        found |= {"changes": changes(run), "training": training_change(run), "has_gold": has_gold}
        found["side_by_side"] = RunFolder(run.path).side_by_side()
        found["missing"] = missing(run) if isinstance(run, RecordedRun) else {}
    return found


def comparison_context(runs: Sequence[Run] | Sequence[ControlRun]) -> dict[str, Any]:
    """What the template of several runs reads beside the plots."""
    arms = arms_of(runs)
    figures = [final_figures(arm) for arm in arms]
    matrix = win_matrix(arms)
    counts = {cell.count for row in matrix for cell in row if cell}
    return {
        "arms": arms,
        "models": dict.fromkeys(run.model for run in runs),
        "columns": [column for column in COLUMNS if any(column.key in found for found in figures)],
        "figures": figures,
        "matrix": matrix,
        "prompt_counts": sorted(counts),
    }


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("dar.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, difference, duration, count, spans, wilson, visible)
    environment.filters |= {each.__name__: each for each in filters}
    return environment


@cache
def _static(name: str) -> str:
    return (files("dar.report") / "static" / name).read_text(encoding="utf-8")
