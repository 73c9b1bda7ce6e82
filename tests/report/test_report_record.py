"""The report's figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.run_folders import add_alert, write_run
from typer.testing import CliRunner

from dar.cli.app import app
from dar.report.comparison import arms_of, final_figures
from dar.report.record import record, run_record
from dar.report.run import load_run, load_runs


def test_one_run_has_its_measures_before_and_after(tmp_path: Path):
    run = load_run(write_run(tmp_path / "one", gain=1.0))
    found = run_record(run)
    assert (found["folder"], found["steps_done"], found["steps"], found["is_finished"]) == (str(run.path), 6, 6, True)
    rows = run.evaluations
    reward = found["heldout"]["reward"]
    assert (reward["before"], reward["after"]) == (rows[0]["reward"], rows[-1]["reward"])
    assert reward["change"]["mean"] == pytest.approx(reward["after"] - reward["before"], abs=1e-6)
    assert reward["change"]["count"] == 4
    assert found["heldout"]["entropy"]["change"] is None
    assert "training_reward" not in found


def test_a_run_without_held_out_prompts_has_its_training_reward(tmp_path: Path):
    run = load_run(write_run(tmp_path / "one", evaluations=()))
    rewards = run.series("reward")[1]
    found = run_record(run)
    assert found["heldout"] == {}
    assert found["training_reward"] == {"first": rewards[0], "last": rewards[-1], "steps": 1}


def test_alerts_are_in_the_record(tmp_path: Path):
    folder = write_run(tmp_path / "one", steps=4, evaluations=(0, 3))
    add_alert(folder, step=3, rule="kl", action="mark")
    add_alert(folder, step=4, rule="entropy", action="stop")
    found = run_record(load_run(folder))
    assert [alert["rule"] for alert in found["alerts"]] == ["kl", "entropy"]
    assert found["stopped_by"] == found["alerts"][1]
    assert (found["steps_done"], found["is_finished"]) == (4, False)


def test_several_runs_have_their_figures_and_wins(tmp_path: Path):
    folders = [
        write_run(tmp_path / f"{name}-seed0", gain=gain, algorithm=name) for name, gain in (("dar", 1), ("grpo", 9))
    ]
    runs = load_runs(folders)
    found = record(runs)
    assert [arm["name"] for arm in found["arms"]] == ["dar", "grpo"]
    figures = final_figures(arms_of(runs)[1])
    keyed = found["arms"][1]["figures"]
    assert keyed["kl/ref"]["mean"] == figures["kl/ref"].mean
    assert keyed["seconds"]["mean"] == figures["seconds"].mean
    assert found["arms"][1]["runs"] == [str(folders[1])]
    assert found["wins"][0][0] is None
    assert (found["wins"][1][0]["share"], found["wins"][0][1]["share"]) == (1.0, 0.0)
    assert found["runs"] == [run_record(run) for run in runs]


def test_the_command_prints_the_record_and_nothing_else(tmp_path: Path):
    folder = write_run(tmp_path / "one")
    result = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.pop("report") == str(folder / "report.html")
    assert found == record([load_run(folder)])
