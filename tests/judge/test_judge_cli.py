"""`dar judge FILE`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.rows import write_rows
from support.scripted_judge import ScriptedJudge, refused, user_text
from test_judge import length_script, prefers_longer
from typer.testing import CliRunner, Result

from dar.cli.app import app
from dar.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(folder: Path, url: str, rows: list[dict[str, object]], *options: str) -> Result:
    path = write_rows(folder / "rows.jsonl", rows)
    return CliRunner().invoke(app, ["judge", str(path), "--base-url", url, "--model", "m", *options])


def test_scores_as_json(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": "p", "completion": "aaa"}, {"prompt": "p", "completion": "a"}]
    with ScriptedJudge(length_script) as server:
        result = run(tmp_path, server.url, rows, "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"score": 3.0, "mass": None, "answer": "3"},
        {"score": 1.0, "mass": None, "answer": "1"},
    ]
    assert result.exit_code == 0


def test_a_summary_of_scores_and_failures(tmp_path: Path):
    script = lambda body, before: refused(400, "no") if "bad" in user_text(body) else length_script(body, before)  # noqa: E731
    rows: list[dict[str, object]] = [{"prompt": "p", "completion": text} for text in ("a", "aa", "aaaaa", "bad")]
    with ScriptedJudge(script) as server:
        result = run(tmp_path, server.url, rows)
    for shown in ("4 rows", "the judge refused the request: 400: no", "2.667", "1.000, 2.000, 5.000", "0 of 3"):
        assert shown in " ".join(result.stdout.split())
    assert result.exit_code == 1


def test_pairs(tmp_path: Path):
    rows: list[dict[str, object]] = [
        {"prompt": "p", "completion_a": "aa", "completion_b": "b", "why": "short"},
        {"prompt": "p", "completion_a": "aa", "completion_b": "bb", "why": "short"},
    ]
    with ScriptedJudge(prefers_longer) as server:
        result = run(tmp_path, server.url, rows, "--mode", "pairwise", "--rubric-column", "why")
        asked = [user_text(body) for body in server.bodies]
        as_json = run(tmp_path, server.url, rows, "--mode", "pairwise", "--rubric-column", "why", "--json")
    assert all("short" in text for text in asked)
    assert "1 (50%)" in result.stdout
    assert json.loads(as_json.stdout.splitlines()[0]) == {
        "winner": "a",
        "share_a": None,
        "agrees": True,
        "answers": ["A", "B"],
    }


def test_rows_without_the_columns(tmp_path: Path):
    result = run(tmp_path, "http://127.0.0.1:9/v1", [{"prompt": "p", "text": "a"}])
    assert isinstance(result.exception, DataError)
    assert str(result.exception).endswith("rows.jsonl: row 0 has no completion; it has prompt, text")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "completion": None}, "completion must be text or a list of messages with role and content"),
        ({"prompt": 5, "completion": "c"}, "prompt must be text or a list of messages with role and content, found 5"),
        (
            {"prompt": [{"role": "user", "content": [1]}], "completion": "c"},
            "message 0: 'content' must be text",
        ),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "prompt must be text or a list of messages"),
        ({"prompt": [], "completion": "c"}, r"found []"),
    ],
)
def test_rows_that_are_no_text(tmp_path: Path, row: dict[str, object], problem: str):
    result = run(tmp_path, "http://127.0.0.1:9/v1", [{"prompt": "p", "completion": "c"}, row])
    assert isinstance(result.exception, DataError)
    assert "rows.jsonl: row 1: " in str(result.exception)
    assert problem in str(result.exception)


def test_messages_are_judged_by_what_they_say(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": "p", "completion": [{"role": "assistant", "content": "aaa"}]}]
    with ScriptedJudge(length_script) as server:
        result = run(tmp_path, server.url, rows, "--json")
    assert json.loads(result.stdout)["score"] == 3.0


def test_settings_of_the_reward(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": "p", "completion": "aaa"}]
    held = "endpoint.parameters.guided_choice=['3', '4']"
    with ScriptedJudge(length_script) as server:
        result = run(tmp_path, server.url, rows, "scale=[0, 5]", "endpoint.max_tokens=2", held, "--json")
    assert json.loads(result.stdout)["score"] == 3.0
    (body,) = server.bodies
    assert (body["max_tokens"], body["guided_choice"]) == (2, ["3", "4"])
    assert "from 0 (useless) to 5" in user_text(body)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scales=[0, 5]", "dar judge: unknown key 'scales' (did you mean 'scale'?)"),
        ("scale=[5, 0]", "dar judge: scale: "),
        ("scale", "override 'scale' is not of the form key.path=value"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, setting: str, message: str):
    result = run(tmp_path, "http://127.0.0.1:9/v1", [{"prompt": "p", "completion": "a"}], setting)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(message)


def test_a_url_that_is_none(tmp_path: Path):
    result = run(tmp_path, "localhost", [{"prompt": "p", "completion": "a"}])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("dar judge: endpoint.base_url: expected a URL such as")
