"""The runs below a folder: found, told apart, and newest first."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support.run_folders import write_run

from dar.config.recipe import build_spec
from dar.config.reward_model import RewardModelSpec
from dar.errors import ConfigError
from dar.report.listing import list_runs
from dar.run.folder import RunFolder


def age(folder: Path, seconds: float) -> Path:
    """A folder that was last written to so long ago."""
    for name in ("config.yaml", "metrics.jsonl"):
        if (folder / name).exists():
            os.utime(folder / name, (time.time() - seconds,) * 2)
    return folder


def test_runs_below_a_folder_are_listed_newest_first_with_their_state(tmp_path: Path):
    write_run(tmp_path / "now", steps=3, evaluations=(), algorithm="grpo", num_generations=2)
    finished = age(write_run(tmp_path / "compare/dar-seed0", evaluations=(0, 6)), 400)
    (finished / "model").mkdir()
    stopped = age(write_run(tmp_path / "a/stopped", steps=4), 500)
    (stopped / "checkpoints/step-4").mkdir(parents=True)
    age(write_run(tmp_path / "failed", steps=0, evaluations=()), 600)
    pairs = RunFolder(tmp_path / "pairs")
    recipe = {"model": "some/base", "data": "pairs.jsonl", "epochs": 1.0, "output_dir": "pairs"}
    pairs.start(build_spec(recipe, where="recipe", kind=RewardModelSpec), {})
    pairs.append_metrics({"step": 0, "eval/accuracy": 0.5})
    age(pairs.path, 700)
    (pairs.path / "model").mkdir()
    age(write_run(tmp_path / "damaged"), 800)
    (tmp_path / "damaged/metrics.jsonl").write_text("{\n")
    age(tmp_path / "damaged", 800)
    write_run(tmp_path / ".hidden")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").touch()

    found = list_runs(tmp_path)
    names = [Path(run.folder).relative_to(tmp_path).as_posix() for run in found]
    assert names == ["now", "compare/dar-seed0", "a/stopped", "failed", "pairs", "damaged"]
    assert [run.state for run in found[:-1]] == ["running", "finished", "stopped", "failed", "finished"]
    assert found[-1].state.startswith("damaged: ")
    assert [run.method for run in found[:-1]] == ["grpo", "dar", "dar", "dar", "reward-model"]
    assert [(run.done, run.steps) for run in found[:-1]] == [(3, 6), (6, 6), (4, 6), (0, 6), (0, None)]
    assert [run.metric for run in found[:-1]] == ["reward", "eval/reward", "eval/reward", None, "eval/accuracy"]
    lines = [row for row in RunFolder(finished).metrics() if "eval/reward" in row]
    assert (found[1].first, found[1].last) == (lines[0]["eval/reward"], lines[-1]["eval/reward"])


def test_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no folder .*absent"):
        list_runs(tmp_path / "absent")
