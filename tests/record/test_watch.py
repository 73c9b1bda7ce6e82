"""Alerts in whole runs: planted ways to cheat raise theirs and no other, stopping saves, resuming goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.handmade import make_spec
from typer.testing import CliRunner

from dar.assembly.loop import build_loop
from dar.cli.app import app
from dar.config.alerts import KLAlertSpec, MissingEosAlertSpec
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.record.folder import RunFolder
from dar.record.watch import Watch
from dar.trainer import TrainResult, run_loop

WriteRecipe = Callable[..., Path]

# --- the watch -------------------------------------------------------------------------------------------------------


def test_watch_reads_its_own_lines_and_remembers_the_first_that_stops():
    watch = Watch(
        [
            KLAlertSpec(max=1.0, window=1),
            MissingEosAlertSpec(max=0.5, window=1, samples="heldout", action="stop"),
            KLAlertSpec(max=5.0, window=1, action="stop"),
        ]
    )
    assert watch.see({"step": 0, "eval/completions/clipped_ratio": 0.1, "eval/kl/ref": 99.0}) == []
    assert [alert.action for alert in watch.see({"step": 1, "kl/ref": 2.0, "completions/clipped_ratio": 1.0})] == [
        "mark"
    ]
    assert watch.stopped_by is None
    (alert,) = watch.see({"step": 1, "eval/completions/clipped_ratio": 0.6})
    watch.see({"step": 2, "kl/ref": 9.0})
    assert watch.stopped_by == alert


def test_restored_watch_does_not_tell_again_what_it_told_before():
    lines = [{"step": 1, "kl/ref": 0.5}, {"step": 2, "kl/ref": 2.0}]
    watch = Watch([KLAlertSpec(max=1.0, window=1, action="stop")])
    watch.restore(lines)
    assert watch.stopped_by is None
    assert watch.see({"step": 3, "kl/ref": 3.0}) == []
    assert watch.see({"step": 4, "kl/ref": 0.5}) == []
    assert [alert.step for alert in watch.see({"step": 5, "kl/ref": 3.0})] == [5]


# --- planted cases ---------------------------------------------------------------------------------------------------

BRIEF: dict[str, Any] = {"type": "length", "target": 5, "name": "brief"}
LETTERS: dict[str, Any] = {"type": "pattern_count", "pattern": "[abcd]"}
ALERTS: list[dict[str, Any]] = [
    {"type": "missing_eos", "max": 0.5},
    {"type": "kl", "max": 30.0},
    {"type": "length_drift", "max_ratio": 1.8},
    {"type": "repetition", "max": 0.6},
    {"type": "overoptimization", "min_fall": 1.0},
]


def watched_run(folder: Path, **changes: Any) -> TrainResult:
    """The toy language of four letters, five tokens a completion at first, with all that ALERTS watches."""
    settings: dict[str, Any] = {
        "model": "toy:letters",
        "data": {"train": "package:dar/prompts/toy.jsonl", "heldout": "package:dar/prompts/toy.jsonl"},
        "algorithm": "rloo",
        "sampling": {"max_completion_length": 48},
        "optim": {"learning_rate": 1e-2},
        "prompts_per_step": 4,
        "num_generations": 16,
        "output_dir": str(folder),
        "evaluation": {"every": 2, "num_generations": 32, "rewards": [BRIEF]},
        "checkpoint": {"every": 0},
        "logging": {"old_kl_prompts": 0, "completions_every": 0},
        "runtime": {"device": "cpu", "precision": "fp32"},
        "alerts": ALERTS,
    }
    loop = build_loop(make_spec(**settings | changes), quiet=True)
    return run_loop(loop, resume=False, command="test")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_reward_that_pays_for_length_raises_length_drift_and_overoptimization(tmp_path: Path):
    """Every letter pays; what the reward is held against wants five. Within ten steps completions are eight times as
    long and mostly cut off, but few are within the first seven."""
    watched_run(tmp_path / "run", rewards=[LETTERS], steps=7)
    alerts = RunFolder(tmp_path / "run").alerts()
    assert {alert["rule"] for alert in alerts} == {"length_drift", "overoptimization"}
    assert all(alert["action"] == "mark" for alert in alerts)
    for alert in alerts:
        sign = 1 if alert["rule"] == "length_drift" else -1
        assert sign * alert["value"] > sign * alert["threshold"]


@pytest.mark.usefixtures("cache")
def test_reward_that_pays_for_repetition_raises_repetition_alone(tmp_path: Path):
    """Every a pays, and the room is short, so that lengths have nowhere to go; missing ends are not watched here."""
    reward = {"type": "pattern_count", "pattern": "a"}
    watched_run(tmp_path / "run", rewards=[reward], steps=14, sampling={"max_completion_length": 6}, alerts=ALERTS[1:])
    assert {alert["rule"] for alert in RunFolder(tmp_path / "run").alerts()} == {"repetition"}


@pytest.mark.usefixtures("cache")
def test_clean_run_raises_nothing(tmp_path: Path):
    entropy = {"type": "entropy", "min_ratio": 0.3}
    reward = {"type": "regex", "pattern": "^a"}
    result = watched_run(tmp_path / "run", rewards=[reward], steps=12, alerts=[*ALERTS, entropy])
    # It does learn: one completion in six or so begins with an a at first.
    assert result.metrics[0]["eval/reward"] < 0.3 < 0.5 < result.metrics[-1]["eval/reward"]
    assert not (tmp_path / "run" / "alerts.jsonl").exists()
    assert result.stopped_by is None


# --- stopping and resuming -------------------------------------------------------------------------------------------

# Completions of the tiny model are short of room at every step, and the step counts are exact.
STOP = [{"type": "missing_eos", "max": 0.1, "window": 2, "action": "stop"}]


def test_stop_saves_says_why_and_has_an_exit_code_of_its_own(write_recipe: WriteRecipe, tmp_path: Path):
    recipe = write_recipe(steps=5, checkpoint={"every": 0}, alerts=STOP)
    found = CliRunner().invoke(app, ["train", str(recipe), "--quiet"])
    assert found.exit_code == 3
    assert found.stdout == ""
    message = " ".join(found.stderr.split())
    assert message.startswith("dar: stopped after step 2 of 5 by the alert missing_eos: ")
    assert "of completions ran out of room before they ended (training, mean of 2 steps; limit 10%)" in message
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-2"]
    assert not folder.model.exists()
    (alert,) = folder.alerts()
    assert alert.keys() == {"step", "rule", "action", "metric", "value", "threshold", "message"}
    assert (alert["step"], alert["rule"], alert["action"], alert["threshold"]) == (2, "missing_eos", "stop", 0.1)
    assert alert["value"] == pytest.approx(sum(row["completions/clipped_ratio"] for row in folder.metrics()) / 2)


def test_python_is_told_what_stopped_the_run(write_recipe: WriteRecipe):
    recipe = write_recipe(steps=5, checkpoint={"every": 0}, alerts=STOP)
    result = run_loop(build_loop(load_recipe(recipe), quiet=True), resume=False, command="test")
    assert result.steps == 2
    assert result.stopped_by is not None
    assert (result.stopped_by.step, result.stopped_by.rule) == (2, "missing_eos")


def test_resumed_run_goes_on_past_the_alert_that_stopped_it(write_recipe: WriteRecipe, tmp_path: Path):
    """Its user has seen it. The rule stays broken, and is told of again only when it has held in between."""
    recipe = write_recipe(steps=5, checkpoint={"every": 0}, alerts=STOP)
    assert CliRunner().invoke(app, ["train", str(recipe), "--quiet"]).exit_code == 3
    assert CliRunner().invoke(app, ["train", str(recipe), "--quiet", "--resume"]).exit_code == 0
    stopped = RunFolder(tmp_path / "run")
    assert [row["step"] for row in stopped.metrics()] == [1, 2, 3, 4, 5]
    assert [alert["step"] for alert in stopped.alerts()] == [2]


def test_alerts_change_nothing_and_a_resumed_run_writes_the_same(write_recipe: WriteRecipe, tmp_path: Path):
    log = [{**STOP[0], "action": "log", "window": 3}]
    recipe = write_recipe(steps=5, checkpoint={"every": 2}, alerts=log)
    whole = CliRunner().invoke(app, ["train", str(recipe), f"output_dir={tmp_path / 'whole'}"])
    assert "alert after step 3, missing_eos: " in " ".join(whole.stdout.split())
    lines = (tmp_path / "whole" / "alerts.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [3]
    # As if killed after step 3: its line and its alert are there, its checkpoint is that of step 2.
    cut = RunFolder(tmp_path / "whole")
    for path in cut.checkpoints.iterdir():
        if path.name != "step-2":
            path.rename(tmp_path / path.name)
    again = CliRunner().invoke(app, ["train", str(recipe), f"output_dir={cut.path}", "--resume", "--quiet"])
    assert again.exit_code == 0
    assert (tmp_path / "whole" / "alerts.jsonl").read_text() == lines


def test_alert_before_the_first_step_stops_there(write_recipe: WriteRecipe, tmp_path: Path):
    prompts = str(tmp_path / "prompts.jsonl")
    heldout = [{**STOP[0], "window": 1, "samples": "heldout"}]
    recipe = write_recipe(steps=5, data={"train": prompts, "heldout": prompts}, alerts=heldout)
    found = CliRunner().invoke(app, ["train", str(recipe), "--quiet"])
    assert found.exit_code == 3
    assert "stopped after step 0 of 5" in " ".join(found.stderr.split())
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()] == [0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_alert_at_the_last_step_has_nothing_to_stop(write_recipe: WriteRecipe, tmp_path: Path):
    recipe = write_recipe(steps=2, alerts=STOP)
    assert CliRunner().invoke(app, ["train", str(recipe), "--quiet"]).exit_code == 0
    (alert,) = RunFolder(tmp_path / "run").alerts()
    assert alert["step"] == 2
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"* step 2, missing_eos (stop): {alert['message']}\n" in card


def test_kl_alert_of_a_method_that_does_not_read_the_reference_is_refused(write_recipe: WriteRecipe):
    recipe = write_recipe(algorithm="awr", alerts=[{"type": "kl", "max": 5.0, "window": 1}])
    with pytest.raises(ConfigError, match="kl alert watches the training steps, but awr as it is set does not read π₀"):
        build_loop(load_recipe(recipe), quiet=True)
