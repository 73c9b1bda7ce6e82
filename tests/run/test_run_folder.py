"""The run folder: never half a file, never two runs in one, and a resumed run writes its steps once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from support.handmade import make_spec

from dar.config.recipe import load_recipe
from dar.errors import CheckpointError, NonFiniteError
from dar.run.folder import RunFolder


@pytest.fixture
def started(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first", {"data.train (its rows)": "a1"})
    folder.start(make_spec(), {"torch": "2"})
    return folder


def test_new_run_writes_recipe_and_environment(started: RunFolder):
    assert started.is_run
    assert load_recipe(started.path / "config.yaml") == make_spec()
    assert json.loads((started.path / "environment.json").read_text()) == {"torch": "2"}
    assert sorted(file.name for file in started.path.iterdir()) == ["config.yaml", "data.json", "environment.json"]


def test_folder_that_holds_a_run_is_not_overwritten(started: RunFolder):
    with pytest.raises(CheckpointError) as caught:
        started.start(make_spec(steps=9), {})
    assert str(caught.value) == (
        f"{started.path} already holds a run: continue it with --resume (resume_from_checkpoint=True in Python), or "
        "choose another output_dir"
    )
    assert load_recipe(started.path / "config.yaml").steps == 3


def test_folder_with_other_files_may_be_used(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).start(make_spec(), {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()  # nothing can be made below a file, not even by root
    with pytest.raises(CheckpointError, match=r"the run folder .*file/run cannot be written: .*[Nn]ot a directory"):
        RunFolder(tmp_path / "file" / "run").start(make_spec(), {})


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunFolder(tmp_path / "run").start(make_spec(), {})


# --- resuming --------------------------------------------------------------------------------------------------------


def test_folder_that_is_no_run_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.yaml\. Start without --resume"):
        RunFolder(tmp_path).require_same_recipe(make_spec(), allow_changes=False)


def test_same_recipe_is_accepted(started: RunFolder):
    started.require_same_recipe(make_spec(), allow_changes=False)


def test_changed_recipe_is_refused_with_the_differences(started: RunFolder):
    changed = make_spec(seed=5, algorithm="rloo")
    with pytest.raises(CheckpointError) as caught:
        started.require_same_recipe(changed, allow_changes=False)
    message = str(caught.value)
    assert message.startswith(f"the recipe or its data differs from what {started.path} was started with:\n")
    assert "  seed: 0 → 5\n" in message
    assert "  algorithm.type: 'dar' → 'rloo'\n" in message
    assert "  algorithm.w_clip: 20.0 → '(absent)'\n" in message
    assert "model" not in message
    assert "--allow-changed-recipe" in message
    assert load_recipe(started.path / "config.yaml") == make_spec()


def test_changed_recipe_is_written_down_when_allowed(started: RunFolder):
    changed = make_spec(seed=5)
    started.require_same_recipe(changed, allow_changes=True)
    # Until the checkpoint is loaded the run may still fail to go on, and is then the run it was.
    assert load_recipe(started.path / "config.yaml") == make_spec()
    started.record_recipe(changed)
    assert load_recipe(started.path / "config.yaml") == changed


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "elsewhere"},
        {"checkpoint": {"every": 7, "keep": 5}},
        {"logging": {"every": 3, "trackers": ["tensorboard"], "completions_every": 0}},
        {"runtime": {"max_logprob_gap": 0.5}},
        {"alerts": [{"type": "missing_eos", "window": 1, "action": "stop"}]},
    ],
)
def test_what_changes_no_number_may_change(started: RunFolder, changes: dict[str, Any]):
    started.require_same_recipe(make_spec(**changes), allow_changes=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4},
        {"runtime": {"max_tokens_per_microbatch": 8}},
        {"runtime": {"precision": "fp32"}},
        {"rewards": [{"type": "sentiment", "weight": 2.0}]},
        {"rewards": ["sentiment", {"type": "length", "target": 3}]},
        {"data": {"train": "prompts.jsonl", "heldout": "held.jsonl"}},
    ],
)
def test_what_changes_numbers_may_not_change(started: RunFolder, changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="the recipe or its data differs"):
        started.require_same_recipe(make_spec(**changes), allow_changes=False)


def test_changed_data_is_refused_with_what_differs_until_it_is_allowed(tmp_path: Path):
    RunFolder(tmp_path, {"rows": "aa", "tokens": "bb"}).start(make_spec(), {})
    RunFolder(tmp_path, {"rows": "aa", "tokens": "bb"}).require_same_recipe(make_spec(), allow_changes=False)
    changed = RunFolder(tmp_path, {"rows": "aa", "tokens": "cc"})
    with pytest.raises(CheckpointError, match=r"was started with:\n  tokens: 'bb' → 'cc'\nUndo the change"):
        changed.require_same_recipe(make_spec(), allow_changes=False)
    changed.require_same_recipe(make_spec(), allow_changes=True)
    changed.record_recipe(make_spec())
    changed.require_same_recipe(make_spec(), allow_changes=False)
    # Who has only the recipe, as a comparison of runs, compares that.
    RunFolder(tmp_path).require_same_recipe(make_spec(), allow_changes=False)


@pytest.mark.parametrize("text", ["", "[1]", "\xff"])
def test_damaged_record_of_the_data_is_refused(started: RunFolder, text: str):
    (started.path / "data.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"cannot read .*data\.json"):
        started.require_same_recipe(make_spec(), allow_changes=False)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_read_back_as_written(started: RunFolder):
    rows = [{"step": 1, "reward": 0.1, "kl": 1e-300}, {"step": 2, "reward": 1 / 3, "num_tokens": 2**53 + 1}]
    for row in rows:
        started.append_metrics(row)
    assert started.metrics() == rows
    assert RunFolder(started.path / "empty").metrics() == []


def test_half_written_last_line_is_no_metric(started: RunFolder):
    started.append_metrics({"step": 1})
    with (started.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "rew')
    assert started.metrics() == [{"step": 1}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metric_that_is_not_finite_is_named_and_not_written(started: RunFolder, value: float):
    with pytest.raises(NonFiniteError, match="kl/old"):
        started.append_metrics({"step": 1, "reward": 0.5, "kl/old": value})
    assert started.metrics() == []


def test_metrics_that_cannot_be_written_are_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
        RunFolder(tmp_path / "absent").append_metrics({"step": 1})


def test_damaged_metrics_are_refused_with_the_line(started: RunFolder):
    started.append_metrics({"step": 1})
    with (started.path / "metrics.jsonl").open("a") as stream:
        stream.write("{half\n")
    with pytest.raises(CheckpointError, match="line 2"):
        started.metrics()


# --- completions and going back --------------------------------------------------------------------------------------


def test_completions_are_a_table(started: RunFolder):
    columns = {"completion": ["a", "b"], "reward": [0.5, -1.0]}
    started.write_completions("step-1", columns)
    table = pyarrow.parquet.read_table(started.path / "completions" / "step-1.parquet")
    assert table.to_pydict() == columns
    assert [file.name for file in (started.path / "completions").iterdir()] == ["step-1.parquet"]


def test_completions_that_cannot_be_written_are_an_error(started: RunFolder):
    (started.path / "completions").touch()
    with pytest.raises(CheckpointError, match=r"cannot write step-1.parquet into .*completions"):
        started.write_completions("step-1", {"completion": ["a"]})


def test_steps_after_the_checkpoint_are_forgotten(started: RunFolder):
    for step in (0, 8, 9, 10, 11):
        started.append_metrics({"step": step})
        started.write_completions(f"step-{step}", {"completion": ["a"]})
        started.write_completions(f"heldout-step-{step}", {"completion": ["a"]})
    with (started.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 12')
    started.forget_after(9)
    assert [row["step"] for row in started.metrics()] == [0, 8, 9]
    assert sorted(file.stem for file in (started.path / "completions").iterdir()) == sorted(
        f"{kind}step-{step}" for kind in ("", "heldout-") for step in (0, 8, 9)
    )
    started.append_metrics({"step": 10})
    assert [row["step"] for row in started.metrics()] == [0, 8, 9, 10]


def test_everything_is_forgotten_when_no_step_was_saved(started: RunFolder):
    started.append_metrics({"step": 0})
    started.write_completions("heldout-step-0", {"completion": ["a"]})
    started.forget_after(-1)
    assert started.metrics() == []
    assert list((started.path / "completions").iterdir()) == []
    assert started.is_run
