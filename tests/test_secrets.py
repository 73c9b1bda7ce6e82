"""Secrets that the process knows: they are in no message, and in nothing that a run or an evaluation writes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from dar import shown
from dar.errors import DataError
from dar.evaluate.folder import EvaluationFolder
from dar.record.folder import RunFolder
from dar.shown import keep_secret, one_line, redacted, visible

SECRET = "abc-very/secret"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_secrets", set())
    keep_secret(SECRET)


def test_a_secret_is_taken_out_wherever_it_stands():
    text = f"{SECRET} and {SECRET}{SECRET}"
    assert redacted(text) == visible(text) == one_line(text) == str(DataError(text)) == "*** and ******"


def test_one_that_holds_another_goes_as_a_whole():
    keep_secret(SECRET + "-longer")
    assert redacted(f"{SECRET}-longer") == "***"


def test_what_json_makes_of_a_secret_is_one():
    keep_secret('quoted"secret\\')
    assert json.loads(redacted(json.dumps({"said": 'quoted"secret\\!'}))) == {"said": "***!"}


@pytest.mark.parametrize("start", range(1185, 1201))
def test_nothing_is_cut_before_the_secret_is_out(start: int):
    # Of a long text only so many characters are looked at, and white space among them takes no place.
    assert "abc" not in one_line(" " * start + SECRET + "x" * 2000)
    assert "abc" not in str(DataError("x" * (start + 6800) + SECRET))


@pytest.mark.parametrize("placeholder", ["", "EMPTY", "sk-1234"])
def test_placeholders_are_words_like_others(placeholder: str):
    keep_secret(placeholder)
    assert redacted(f"the {placeholder} word") == f"the {placeholder} word"


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"])
def test_what_the_environment_has_for_servers_is_secret(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "hf_0123456789")
    assert redacted("with hf_0123456789") == "with ***"


def test_a_run_folder_has_none(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.append_alert({"step": 1, "message": SECRET})
    folder.write_evaluation({"model": SECRET})
    folder.write_completions("step-1", {"completion": [f"it is {SECRET}", "x"], "reward": [1.0, None]})
    assert folder.alerts() == [{"step": 1, "message": "***"}]
    assert folder.evaluation() == {"model": "***"}
    table = pyarrow.parquet.read_table(tmp_path / "completions" / "step-1.parquet")
    assert table.to_pydict() == {"completion": ["it is ***", "x"], "reward": [1.0, None]}


def test_an_evaluation_has_none(tmp_path: Path):
    lines = EvaluationFolder(tmp_path / "e", {}).lines("judgements", key=("pair",))
    lines.append([{"pair": "1", "verdict": f"[[A]] {SECRET}"}])
    assert lines.rows == {("1",): {"pair": "1", "verdict": "[[A]] ***"}}
    assert SECRET not in lines.path.read_text()
