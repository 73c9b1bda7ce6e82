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
from dar.errors import CheckpointError, ConfigError, NonFiniteError
from dar.record.folder import RunFolder


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


def prepared(folder: RunFolder, *, resume: bool = False, overwrite: bool = False, steps: int = 3) -> bool:
    return folder.prepare(make_spec(steps=steps), resume=resume, overwrite=overwrite)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-1", "model"])
def test_folder_that_holds_a_step_is_not_overwritten_unless_asked_for(started: RunFolder, left: str):
    (started.path / left).mkdir(parents=True) if left != "metrics.jsonl" else started.append_metrics({"step": 1})
    with pytest.raises(CheckpointError, match=r"already holds a run: continue it with --resume .* --overwrite "):
        prepared(started)
    assert not prepared(started, overwrite=True)
    assert prepared(started, resume=True)
    with pytest.raises(ConfigError, match="--resume continues the run in output_dir and --overwrite removes it"):
        prepared(started, resume=True, overwrite=True)
    assert (started.path / left).exists(), "whatever is there stays until the new run has passed its checks"


@pytest.mark.parametrize("resume", [False, True])
def test_failed_start_is_no_run_to_continue_or_to_lose(started: RunFolder, resume: bool):
    started.append_metrics({"step": 0, "eval/reward": 1.0})
    assert not prepared(started, resume=resume, steps=9)


def test_new_run_leaves_nothing_of_the_old_one_and_everything_of_others(started: RunFolder):
    for folder in ("checkpoints/step-1", "checkpoints/.writing-step-2-x", "best", "model", "completions", "notes"):
        (started.path / folder).mkdir(parents=True)
    for name in (
        *("metrics.jsonl", "alerts.jsonl", "evaluation.json", "triage.parquet", "reliability-after.png", "report.html"),
        *("completions/step-1.parquet", "completions/heldout-step-0.parquet", "model/weights"),
        *("completions/mine.csv", "checkpoints/mine", "notes/mine", "mine.txt"),
    ):
        (started.path / name).touch()
    started.start(make_spec(steps=9), {"torch": "3"})
    found = {str(path.relative_to(started.path)) for path in started.path.rglob("*") if path.is_file()}
    own = {"config.yaml", "data.json", "environment.json"}
    assert found == own | {"completions/mine.csv", "checkpoints/mine", "notes/mine", "mine.txt"}
    assert load_recipe(started.path / "config.yaml").steps == 9


def test_folder_with_other_files_may_be_used(tmp_path: Path):
    for name in ("notes.txt", "metrics.jsonl", "model"):
        (tmp_path / name).write_text("mine")
    assert not prepared(RunFolder(tmp_path), overwrite=True)
    RunFolder(tmp_path).start(make_spec(), {})
    assert [(tmp_path / name).read_text() for name in ("notes.txt", "metrics.jsonl", "model")] == ["mine"] * 3


def test_recipe_of_that_name_is_not_taken_for_a_run(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("steps: 3")
    with pytest.raises(CheckpointError, match=r"holds a config\.yaml that no run has written: choose another"):
        prepared(RunFolder(tmp_path), overwrite=True)


@pytest.mark.parametrize("inner", ["run", ""])
def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, inner: str):
    (tmp_path / "file").touch()  # nothing can be made below a file, not even by root
    with pytest.raises(CheckpointError, match=r"the run folder .*file.* cannot be written: "):
        prepared(RunFolder(tmp_path / "file" / inner))


# --- resuming --------------------------------------------------------------------------------------------------------


def test_folder_that_is_not_there_cannot_be_resumed(started: RunFolder):
    with pytest.raises(CheckpointError, match=r"no run to resume: .*/frist does not exist \(did you mean 'first'"):
        prepared(RunFolder(started.path.with_name("frist")), resume=True)


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
    with pytest.raises(CheckpointError, match=r"completions/step-1\.parquet cannot be written"):
        started.write_completions("step-1", {"completion": ["a"]})


def test_steps_after_the_checkpoint_are_forgotten(started: RunFolder):
    for step in (0, 8, 9, 10, 11):
        started.append_metrics({"step": step})
        started.write_completions(f"step-{step}", {"completion": ["a"]})
        started.write_completions(f"heldout-step-{step}", {"completion": ["a"]})
        started.write_completions(f"to-read-step-{step}", {"completion": ["a"]})
    with (started.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 12')
    started.forget_after(9)
    assert [row["step"] for row in started.metrics()] == [0, 8, 9]
    assert sorted(file.stem for file in (started.path / "completions").iterdir()) == sorted(
        f"{kind}step-{step}" for kind in ("", "heldout-", "to-read-") for step in (0, 8, 9)
    )
    started.append_metrics({"step": 10})
    assert [row["step"] for row in started.metrics()] == [0, 8, 9, 10]


def test_the_first_and_last_completions_to_be_read_stand_side_by_side(started: RunFolder):
    def write(step: int, **texts: str) -> None:
        columns = {"prompt": list(texts), "completion": list(texts.values()), "temperature": [0.5] * len(texts)}
        started.write_completions(f"to-read-step-{step}", columns)

    assert started.side_by_side() == (None, [])
    write(0, a="one", b="two", c="three")
    assert started.side_by_side() == (None, [])
    write(10, b="new", a="newer", d="another")
    write(9, a="between")
    # By number and not by name; a prompt that was not asked again has nothing beside it.
    assert started.side_by_side() == (0.5, [("a", "one", "newer"), ("b", "two", "new")])
    (started.path / "completions" / "to-read-step-10.parquet").write_text("no table")
    with pytest.raises(CheckpointError, match=r"to-read-step-10\.parquet cannot be read"):
        started.side_by_side()


def test_everything_is_forgotten_when_no_step_was_saved(started: RunFolder):
    started.append_metrics({"step": 0})
    started.write_completions("heldout-step-0", {"completion": ["a"]})
    started.forget_after(-1)
    assert started.metrics() == []
    assert list((started.path / "completions").iterdir()) == []
    assert started.is_run
