"""One recipe, several methods and seeds: run what is missing, and put the finished runs side by side."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dar.config import RunSpec
from dar.errors import CheckpointError, ConfigError
from dar.recipe import load_recipe
from dar.report.run import Alert, load_run
from dar.report.statistics import mean_interval
from dar.train.run_folder import RunFolder

FIGURES = {
    "reward": "eval/reward",
    "kl_ref": "eval/kl/ref",
    "length": "eval/completions/mean_length",
    "missing_eos": "eval/completions/clipped_ratio",
    "entropy": "eval/entropy",
}
"""What the held-out prompts say at the end, by its name in comparison.json."""


@dataclass(frozen=True)
class Arm:
    """One method with its own settings.

    name: of its folders and in the table.
    method: the algorithm's `type`; the recipe's own keeps the settings it has there, another has its defaults.
    overrides: of the recipe.
    """

    name: str
    method: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A run that was made, or tried.

    error: the last lines it wrote, where it failed.
    stopped_by: the alert of its recipe that ended it early; what it had become by then is its result.
    """

    arm: str
    seed: int
    folder: Path
    error: str | None
    stopped_by: Alert | None = None

    @property
    def is_finished(self) -> bool:
        return self.error is None


def parse_arm(text: str) -> Arm:
    """`grpo`, or `grpo,optim.learning_rate=1e-5` with overrides, or `name:dar,algorithm.beta=0.5` under its own name.

    Raises:
        ConfigError: an override has no `=`.
    """
    head, *overrides = text.split(",")
    name, _, method = head.rpartition(":")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ConfigError(f"'{wrong[0]}' in '{text}' is no override: write key.path=value")
    return Arm(name or method, method, tuple(overrides))


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Methods from the command line: comma-separated names (`dar,grpo`), or one with overrides each.

    Raises:
        ConfigError: two share a name, or there is none.
    """
    arms: list[Arm] = []
    for text in texts:
        arms += (
            [parse_arm(text)] if "=" in text or ":" in text else [parse_arm(name) for name in text.split(",") if name]
        )
    names = [arm.name for arm in arms]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two methods are called {repeated[0]}: name them apart, as in {repeated[0]}_2:{repeated[0]},…"
        )
    if not arms:
        raise ConfigError("no method is named: --algorithms dar,grpo")
    return arms


def run_all(
    recipe: Path,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    note: Callable[[str], None],
) -> list[Outcome]:
    """Trains what is not finished yet, one run after another, each in its own process.

    The folders are `OUT/<method>-seed<n>`. A run that was interrupted is resumed, one that an alert of its recipe
    stopped is done (until the recipe's alerts change), and one that fails is reported and does not stop the others.

    Args:
        recipe: a YAML file.
        overrides: for every run.
        arms, seeds: every combination is run.
        out: folder of the runs.
        note: told what happens.

    Raises:
        ConfigError: the recipe cannot be run with one of the methods, or a folder holds a run of another recipe;
            nothing has been started then.
    """
    own_method = load_recipe(recipe, overrides).algorithm.type
    jobs = []
    for arm in arms:
        method = [] if arm.method == own_method else [f"algorithm={arm.method}"]
        for seed in seeds:
            folder = out / f"{arm.name}-seed{seed}"
            changes = [*overrides, *method, *arm.overrides, f"seed={seed}", f"output_dir={folder}"]
            spec = load_recipe(recipe, changes)
            if spec.data.heldout is None:
                raise ConfigError(f"{recipe} has no data.heldout: there is nothing to compare runs by")
            _require_same_recipe(folder, spec)
            jobs.append((arm, seed, folder, changes, spec))
    outcomes = []
    for number, (arm, seed, folder, changes, spec) in enumerate(jobs, start=1):
        label = f"[{number}/{len(jobs)}] {arm.name}, seed {seed}"
        if _is_finished(folder, spec.steps):
            note(f"{label}: finished before")
            outcomes.append(Outcome(arm.name, seed, folder, None))
        elif alert := _stopped_by(folder, spec):
            note(f"{label}: stopped before, {_reason(alert)}")
            outcomes.append(Outcome(arm.name, seed, folder, None, alert))
        else:
            note(f"{label}: {folder}")
            error = _train(recipe, changes, folder)
            alert = _stopped_by(folder, spec) if error is None else None
            if error is not None:
                note(f"{label} failed ({_log(folder)}):\n{error}")
            elif alert is not None:
                note(f"{label}: stopped {_reason(alert)}")
            outcomes.append(Outcome(arm.name, seed, folder, error, alert))
    return outcomes


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What comparison.json holds: every run's figures and curve, and each method's means with 95 % intervals."""
    runs = [_figures(outcome) for outcome in outcomes if outcome.is_finished]
    methods = {}
    for name in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == name]
        # A run that was stopped before its first step has fewer figures than its neighbors.
        keys = [key for key, value in mine[0].items() if isinstance(value, float) and all(key in run for run in mine)]
        methods[name] = {"runs": len(mine)} | {key: _interval([run[key] for run in mine]) for key in keys}
    failed = [
        {"method": outcome.arm, "seed": outcome.seed, "error": outcome.error}
        for outcome in outcomes
        if not outcome.is_finished
    ]
    return {"methods": methods, "runs": runs, "failed": failed}


def _require_same_recipe(folder: Path, spec: RunSpec) -> None:
    """Raises ConfigError where a run that would be kept or resumed is of another recipe than is asked for now."""
    run = RunFolder(folder)
    if not run.is_run:
        return
    try:
        run.require_same_recipe(spec, allow_changes=False)
    except CheckpointError as error:
        raise ConfigError(f"{error}\nTo compare with the new settings, choose another --out.") from error


def _is_finished(folder: Path, steps: int) -> bool:
    """The run has taken its last step and saved its model."""
    run = RunFolder(folder)
    return run.model.is_dir() and run.is_evaluated(steps)


def _stopped_by(folder: Path, spec: RunSpec) -> Alert | None:
    """The alert that ended the run, if one did; none where other alerts are asked for now, under which it goes on."""
    if not RunFolder(folder).is_run:
        return None
    run = load_run(folder)
    return run.stopped_by if run.spec.alerts == spec.alerts else None


def _reason(alert: Alert) -> str:
    return f"after step {alert.step} by the alert {alert.rule}: {alert.message}"


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _train(recipe: Path, changes: Sequence[str], folder: Path) -> str | None:
    """Starts or resumes one run in a process of its own; the last lines of its log where it failed.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dar", "train", str(recipe), *changes]
    if RunFolder(folder).is_run:
        command.append("--resume")
    log = _log(folder)
    with log.open("a", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code in (130, -2):
        raise KeyboardInterrupt
    return None if code in (0, 3) else "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])


def _figures(outcome: Outcome) -> dict[str, Any]:
    rows = RunFolder(outcome.folder).metrics()
    evaluations = [row for row in rows if "eval/reward" in row]
    steps = [row for row in rows if "loss" in row]
    final = evaluations[-1]
    found: dict[str, Any] = {"method": outcome.arm, "seed": outcome.seed, "folder": str(outcome.folder)}
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


def plot_frontier(summary: dict[str, Any], target: Path) -> None:
    """Held-out reward against KL to π₀, one line per run from the start to its end, as a PNG.

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
        index = names.index(name)
        look: dict[str, Any] = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        roots = [math.sqrt(max(kl, 0.0)) for kl, _ in points]
        rewards = [reward for _, reward in points]
        axes.plot(roots, rewards, **look, alpha=0.6, linewidth=1.2, label=None if name in labelled else name)
        axes.plot(roots[-1], rewards[-1], "o", color=look["color"])
        labelled.add(name)
    ticks = [tick for tick in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if math.sqrt(tick) <= axes.get_xlim()[1]]
    axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("KL(π‖π₀) on held-out prompts, nats per completion (square-root axis)")
    axes.set_ylabel("held-out reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(target, dpi=150)
