"""The plots of a reward model's training: its curves, and whether its probabilities are what they say."""

from __future__ import annotations

from dar.report.curves import Curve
from dar.report.kinds import RewardModelRun
from dar.report.plots import Axis, Plot, Series

CURVES = (
    Curve("loss", "loss", "Loss", Axis("nats per pair"), "−log σ(margin). Untrained it is log 2 = 0.693."),
    Curve("accuracy", "accuracy", "Accuracy", Axis("share of pairs", is_share=True), "Margin above 0; a tie is half."),
    Curve("margin", "margin", "Margin", Axis("score of chosen less rejected"), "Mean over the step's pairs."),
    Curve("mean_reward", "mean_reward", "Mean score", Axis("score"), "Of a step's completions, chosen and rejected."),
)


def reliability(run: RewardModelRun) -> list[Plot]:
    """Accuracy by the probability the model gives its preference; empty without held-out pairs."""
    series = [Series("calibrated", [0.5, 1.0], [0.5, 1.0], 7, "line", is_faint=True)]
    for color, (when, report) in enumerate(run.evaluation.items()):
        x, y = ([part[key] for part in report["reliability"]] for key in ("confidence", "accuracy"))
        series.append(Series(f"{when} training", x, y, color, "line+points"))
    axes = Axis("probability the model gives", is_share=True), Axis("share it is right", is_share=True)
    note = "Held-out pairs, in ten bins of the probability. Below the diagonal the model is too sure of itself."
    return [Plot("reliability", "Calibration", *axes, series, note=note)] if run.evaluation else []
