"""The report of a reward model's training."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.page_reader import ReadPage
from support.run_folders import write_reward_model_run, write_run

from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.report.kinds import RewardModelRun
from dar.report.page import render_page
from dar.report.png import write_pictures
from dar.report.record import record
from dar.report.run import load_trainings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reward_model_run(tmp_path / "rm")


def loaded(folder: Path) -> RewardModelRun:
    found = load_trainings([folder])
    assert isinstance(found, RewardModelRun)
    return found


def test_page_says_how_often_it_is_right_and_what_length_alone_would_be(folder: Path) -> None:
    page = ReadPage(render_page(loaded(folder)))
    # Right on two, wrong on one, a tie: 2.5 of 4. The longer one is chosen in two, a tie in one: 2.5 of 4.
    # Wilson at 0.625 of 4, with z² = 3.841459: (1.105182 ± 0.673876)/1.960365 = 0.220, 0.908.
    assert "Held-out accuracy 50.0 % → 62.5 % (95 % interval 22–91 %, over 4 pairs)" in page.prose
    assert "“the longer one wins” is right on 62.5 %" in page.prose
    assert "Finished after 4 steps." in page.prose
    tables = page.table("4 held-out pairs") + page.table("accuracy where the chosen one is longer by … tokens")
    rows = {row[0]: row[1:] for row in tables}
    assert rows["accuracy"] == ["50.0 % 15–85 %", "62.5 % 22–91 %"]
    assert rows["loss, nats per pair"][0] == "0.693"
    # At ½ of 1: (2.420730 ± 2.156377)/4.841459 = 0.055, 0.945.
    assert rows["−16 to −1"] == ["1", "50.0 % 5–95 %", "0.0 % 0–79 %"]
    assert rows["17 to 64"][2] == "100.0 % 21–100 %"


def test_plots_are_the_metrics_and_the_reliability(folder: Path, tmp_path: Path) -> None:
    plots = ReadPage(render_page(loaded(folder))).data["plots"]
    training, heldout = plots["accuracy"]["series"]
    assert training["y"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert (heldout["x"], heldout["y"]) == ([0, 4], [0.5, 0.625])
    diagonal, _, after = plots["reliability"]["series"]
    assert diagonal["x"] == diagonal["y"]
    # σ(0) = 0.5, a tie; σ(1) = 0.731, one of two right; σ(2) = 0.881.
    assert after["x"] == pytest.approx([0.5, 0.7310586, 0.8807971])
    assert after["y"] == [0.5, 0.5, 1.0]
    names = {file.stem for file in write_pictures(loaded(folder), tmp_path / "png")}
    assert names == {"loss", "accuracy", "margin", "reliability"}


def test_record_has_the_evaluation(folder: Path) -> None:
    run = loaded(folder)
    (found,) = record(run)["runs"]
    assert (found["steps_done"], found["is_finished"], found["heldout"]) == (4, True, run.evaluation)


def test_reward_models_and_policies_are_not_confused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a recipe of another kind: it is for dar reward-model"):
        load_recipe(folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"rm/config\.yaml is a recipe of another kind"):
        load_trainings([write_run(tmp_path / "run"), folder])
