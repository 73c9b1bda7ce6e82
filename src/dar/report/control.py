"""The plots of controllers alone: return over perturbations, the layers' singular values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dar.report.comparison import RecipeRuns, with_band
from dar.report.curves import Curve, plots_of
from dar.report.kinds import ControlRun
from dar.report.plots import Axis, Plot, Series


def control_plots(arms: Sequence[RecipeRuns]) -> list[Plot]:
    """For each parameter the return by its value; singular values, of several runs those of the actor in each recipe's
    first; of a single run also each layer's rank by step. Empty where the runs are of policies."""
    perturbed: dict[str, list[Series]] = {}
    spectra: list[Series] = []
    for color, arm in enumerate(arms):
        runs = [run for run in arm.runs if isinstance(run, ControlRun)]
        tables = [run.evaluation.get("points", []) for run in runs]
        found = [{(each["parameter"], each["value"]): fmean(each["returns"]) for each in table} for table in tables]
        shared = sorted(point for point in set.intersection(*map(set, found)) if point[0]) if found else []
        for name in dict.fromkeys(name for name, _ in shared):
            values = [value for parameter, value in shared if parameter == name]
            returns = [[means[name, value] for means in found] for value in values]
            perturbed.setdefault(name, []).append(with_band(arm, color, values, returns))
        for layer, values in runs[0].evaluation.get("spectra", {}).items() if runs else ():
            if len(arms) == 1 or layer.startswith("actor"):
                shares = [value / (values[0] or 1) for value in values]
                name = layer if len(arms) == 1 else f"{arm.name}, {layer.removeprefix('actor.')}"
                spectra.append(Series(name, [*range(1, len(shares) + 1)], shares, len(spectra)))
    note = "Last evaluation, all other parameters as the model has them; mean over seeds, and their range."
    plots = [Plot(f"perturbed_{place}", name, Axis(name), Axis("return of an episode"), series, note=note)
             for place, (name, series) in enumerate(perturbed.items())]  # fmt: skip
    if spectra:
        axes = Axis("index", is_whole=True), Axis("σᵢ / σ₁")
        plots.append(Plot("spectrum", "Singular values", *axes, spectra, note="Last evaluation."))
    if len(arms) == len(arms[0].runs) == 1:
        run = arms[0].runs[0]
        ranks = {key: key.removeprefix("rank/") for row in run.steps[-1:] for key in row if key.startswith("rank/")}
        plots += plots_of(run, [Curve("", "ranks", "Rank of each layer", Axis("rank"), lines=ranks)])
    return plots
