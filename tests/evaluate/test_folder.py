"""An evaluation's folder: continued where it stopped, never mixed with other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dar.errors import ConfigError, DataError
from dar.evaluate.folder import EvaluationFolder


def test_rows_are_there_again_and_a_cut_line_is_not(tmp_path: Path):
    folder = EvaluationFolder(tmp_path / "e", {"seed": 0})
    folder.lines("model", key=("key",)).append([{"key": "0", "completion": "ü\u2028"}, {"key": "1", "completion": ""}])
    path = tmp_path / "e" / "model.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "2", "comp')
    again = EvaluationFolder(tmp_path / "e", {"seed": 0}).lines("model", key=("key",))
    assert list(again.rows) == [("0",), ("1",)]
    assert again.rows["0",]["completion"] == "ü\u2028"
    assert ("2",) not in again
    again.append([{"key": "2", "completion": "c"}])
    assert path.read_bytes() == whole + b'{"key": "2", "completion": "c"}\n'


def test_a_changed_setting_is_refused_with_both_values(tmp_path: Path):
    EvaluationFolder(tmp_path / "e", {"seed": 0, "model": "a"})
    EvaluationFolder(tmp_path / "e", {"model": "a", "seed": 0}).lines("model", key=("key",)).append([{"key": "0"}])
    with pytest.raises(ConfigError, match=r"the two must not mix: seed: 0 → 1\. Choose another --out"):
        EvaluationFolder(tmp_path / "e", {"seed": 1, "model": "a"})


def test_settings_may_change_while_nothing_depends_on_them(tmp_path: Path):
    EvaluationFolder(tmp_path / "e", {"seed": 0})
    folder = EvaluationFolder(tmp_path / "e", {"seed": 1})
    folder.lines("model", key=("key",)).append([{"key": "0"}])
    EvaluationFolder(tmp_path / "e", {"seed": 1})
    with pytest.raises(ConfigError, match="seed: 1 → 0"):
        EvaluationFolder(tmp_path / "e", {"seed": 0})


def test_a_place_that_cannot_be_written_is_an_error_of_the_option(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/e/settings\.json cannot be written: .*\. Choose another --out"):
        EvaluationFolder(tmp_path / "file" / "e", {})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is in use, and not by an evaluation"):
        EvaluationFolder(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_line_is_named(tmp_path: Path):
    folder = EvaluationFolder(tmp_path / "e", {})
    (tmp_path / "e" / "model.jsonl").write_text('{"key": "0"}\nnonsense\n')
    with pytest.raises(DataError, match=r"model\.jsonl: line 2 is not a row of this evaluation"):
        folder.lines("model", key=("key",))


def test_damaged_settings_are_refused(tmp_path: Path):
    EvaluationFolder(tmp_path / "e", {})
    (tmp_path / "e" / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings\.json is not JSON that can be read"):
        EvaluationFolder(tmp_path / "e", {})
    (tmp_path / "e" / "settings.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"settings\.json holds a list\. Choose another --out"):
        EvaluationFolder(tmp_path / "e", {})
