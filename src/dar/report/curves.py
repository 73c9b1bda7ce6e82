"""The plots of one run over its steps: reward, drift, lengths, endings, variety, over-optimization, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dar.record.measures import BY_KEY, Measure, measures_of
from dar.report.kinds import Run, Training
from dar.report.plots import Axis, Plot, Series, running_mean, thinned
from dar.report.results import evaluation_intervals
from dar.report.spending import PHASES

MAX_POINTS = 2000
"""Steps of a longer run are thinned to this many for the plots."""

STEP = Axis("step", is_whole=True)
KL_AXIS = Axis("KL(π‖π₀), nats per completion, square-root axis", scale="sqrt")


@dataclass(frozen=True)
class Curve:
    """How a metric is drawn by step, or several: `lines` has their keys with their names.

    name: of the plot's element and its PNG. note: its caption.
    """

    key: str
    name: str
    title: str
    axis: Axis
    note: str = ""
    lines: Mapping[str, str] | None = None


CURVES = (
    Curve("reward", "reward", "Reward", Axis("reward"), "Bars: 95 % interval of the mean over held-out prompts."),
    Curve("kl/ref", "kl", "Drift from π₀", Axis("nats per completion"), "KL(π_t‖π₀), k1 estimate."),
    Curve(
        "kl/old_k3",
        "kl_old",
        "Size of each update",
        Axis("nats per completion"),
        "KL(π_t‖π_t+1), k3 estimate on completions that the update was trained on.",
    ),
    Curve(
        "completions/mean_length",
        "length",
        "Length",
        Axis("tokens per completion"),
        "Mean, end of sequence included. Bars: 95 % interval over held-out prompts.",
    ),
    Curve(
        "completions/clipped_ratio",
        "eos",
        "Missing EOS",
        Axis("share cut off before EOS", is_share=True),
        "They ran out of room. A rising share is how length is hacked.",
    ),
    Curve(
        "entropy",
        "entropy",
        "Entropy",
        Axis("nats per token"),
        "Along the policy's own samples; a collapse means that it says the same thing always.",
    ),
    Curve(
        "completions/distinct_2",
        "distinct",
        "Variety",
        Axis("distinct-2"),
        "Different pairs of neighbouring tokens / all pairs. Training and held-out batches differ in size: compare "
        "each with itself only.",
    ),
    Curve(
        "completions/repetition",
        "repetition",
        "Repetition",
        Axis("share of a completion's tokens", is_share=True),
        "Inside its longest repeated n-gram.",
    ),
    Curve(
        "reward_length/pearson",
        "reward_length",
        "Reward and length",
        Axis("correlation"),
        "Pearson's, over the batch. High from the start means that the reward itself pays for length.",
    ),
    Curve(
        "rollout/ess_fraction",
        "ess",
        "Samples of earlier weights",
        Axis("effective sample size", is_share=True),
        "Of the completions' ratios between the weights that learn and those that sampled, as a share of them.",
    ),
    Curve("images/group_distance", "group_distance", "Variety", Axis("distance of a prompt's images")),
    Curve("images/brightness", "brightness", "Brightness", Axis("mean of the pixels, from −1 to 1")),
    Curve(
        "", "rank", "Adapter ranks", Axis("rank"), lines={f"lora/rank_{name}": name for name in ("min", "mean", "max")}
    ),
)
PAIRS = (
    # What stands for the reward in a method that learns from pairs.
    Curve("rewards/accuracies", "accuracy", "Accuracy", Axis("share of pairs", is_share=True), "Margin above 0."),
    Curve("rewards/margins", "margin", "Margin", Axis("β·log(π_θ/π₀)"), "Implicit reward of chosen less rejected."),
    Curve(
        "",
        "pairs",
        "Implicit rewards",
        Axis("β·log(π_θ/π₀)"),
        "Mean over pairs, in the step's last update.",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    ),
)
LOSS = Curve("loss", "loss", "Loss", Axis("the method's own loss"))
PER_TOKEN = Curve("kl", "kl_per_token", "Drift from π₀ per token", Axis("nats per token"), "KL(π‖π₀), k3 estimate.")
GOLD = Curve("gold", "gold", "Gold reward", Axis("gold reward"))
CONTROL = (
    Curve("return", "return", "Return", Axis("return of an episode"), "On the model as it is."),
    Curve("return_mean", "return_mean", "Mean return", Axis("return of an episode"), "Over all perturbations."),
    Curve("return_worst", "return_worst", "Worst return", Axis("return of an episode"), "Of all perturbations."),
    Curve("rank", "rank", "Rank", Axis("mean rank"), "Of the layers between hidden layers."),
)
IN_COMPARISON = (CURVES[0], GOLD, *PAIRS[:2], CURVES[1], CURVES[3], CURVES[4], *CONTROL)


def training_plots(run: Run) -> list[Plot]:
    """The curves this run has data for, in the order of the page: also of held-out measures that no curve is made for.

    A method that learns from data has its pairs and its loss first; of a policy's own samples the loss says little.
    """
    known = {curve.key for curve in (*CURVES, *PAIRS, LOSS)}
    others = [
        Curve(measure.key, measure.key.replace("/", "_"), measure.label.capitalize(), Axis(measure.name))
        for measure in measures_of(run.evaluations[-1] if run.evaluations else {})
        if measure.key not in known and not measure.is_part
    ]
    if not run.series("kl/ref")[0]:
        others.append(PER_TOKEN)
    return plots_of(run, (*PAIRS, LOSS, *others, *CURVES) if run.learns_from_data else (*CURVES, *PAIRS, *others))


def plots_of(run: Training, curves: Sequence[Curve]) -> list[Plot]:
    """The plots for which the run has something."""
    marks = sorted({alert.step for alert in run.alerts})
    found = [(curve, _series(run, curve)) for curve in curves]
    return [
        Plot(curve.name, curve.title, STEP, curve.axis, series, note=curve.note, marks=marks)
        for curve, series in found
        if series
    ]


def overoptimization_plot(run: Run) -> Plot | None:
    """Proxy and gold reward against √KL (Gao et al. 2022, arXiv:2210.10760); None without held-out KL or reward."""
    rows = [row for row in run.evaluations if "kl/ref" in row and "reward" in row]
    if len(rows) < 2:
        return None
    series = [_path("proxy: the reward trained on", rows, "reward", 0)]
    if any("gold" in row for row in rows):
        series.append(_path("gold: a reward not trained on", [row for row in rows if "gold" in row], "gold", 1))
    return Plot(
        "overoptimization",
        "Reward against drift",
        KL_AXIS,
        Axis("held-out reward"),
        series,
        note="Each point is a held-out evaluation, from the start on. Proxy up while gold turns down is "
        "over-optimization.",
    )


def time_plot(run: Run) -> Plot | None:
    """Seconds of each step by phase, stacked; None without timings."""
    rows = [run.steps[index] for index in thinned(len(run.steps), MAX_POINTS)]
    names = {key for row in rows for key in row if key.startswith("time/")}
    if not names:
        return None
    x = [row["step"] for row in rows]
    series = [
        Series(name, x, [row.get(f"time/{phase}", 0.0) for row in rows], color, "bars")
        for color, (phase, name) in enumerate(PHASES.items())
        if f"time/{phase}" in names
    ]
    return Plot(
        "time",
        "Time of each step",
        STEP,
        Axis("seconds"),
        series,
        note="By phase. Held-out evaluations and checkpoints come on top.",
    )


def _series(run: Training, curve: Curve) -> list[Series]:
    if curve.lines is None:
        return [*_training_series(run, curve.key), *_heldout_series(run, curve.key)]
    return [_line(run, key, name, color) for color, (key, name) in enumerate(curve.lines.items()) if run.series(key)[0]]


def _training_series(run: Training, key: str) -> list[Series]:
    """The metric itself, faint, and its running mean over a twentieth of the run where that smooths anything."""
    steps, values = run.series(key)
    if not steps:
        return []
    name, width = "training batch", len(values) // 20
    if width < 2:
        return [_line(run, key, name, 0)]
    keep = thinned(len(steps), MAX_POINTS)
    smooth = running_mean(values, width)
    mean = Series(f"{name}, mean of {width} steps", [steps[i] for i in keep], [smooth[i] for i in keep], 0)
    return [_line(run, key, name, 0, is_faint=True), mean]


def _line(run: Training, key: str, name: str, color: int, *, is_faint: bool = False) -> Series:
    steps, values = run.series(key)
    keep = thinned(len(steps), MAX_POINTS)
    # A single point is no line.
    style = "line" if len(steps) > 1 else "points"
    return Series(name, [steps[i] for i in keep], [values[i] for i in keep], color, style, is_faint)


def _heldout_series(run: Training, key: str) -> list[Series]:
    steps, values = run.series(key, heldout=True)
    if not steps:
        return []
    intervals = evaluation_intervals(run, BY_KEY.get(key, Measure(key, key)))
    half = {step: found.half_width for step, found in intervals.items() if found.half_width is not None}
    has_bars = all(step in half for step in steps)
    low = [value - half[step] for step, value in zip(steps, values)] if has_bars else None
    high = [value + half[step] for step, value in zip(steps, values)] if has_bars else None
    return [Series("held-out", steps, values, 1, "line+points", low=low, high=high)]


def _path(name: str, rows: Sequence[dict[str, float]], key: str, color: int) -> Series:
    return Series(name, [row["kl/ref"] for row in rows], [row[key] for row in rows], color, "line+points")
