"""Whole runs with a judge: an outage in the middle, the key, an unset key, a pair from a judge."""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.judged_runs import judged_training, reported, reported_in_full, weights_of
from support.scripted_judge import Answer, ScriptedJudge, between, said, user_text

from dar.errors import BudgetError, ConfigError, RewardError

KEY = "abc-very-secret"


def scores(body: dict[str, Any], before: int) -> Answer:
    """A number from 1 to 10 that only the completion decides, in a while."""
    text = between(user_text(body), "completion")
    return said(str(zlib.crc32(text.encode()) % 10 + 1), delay=0.02)


@pytest.fixture
def train(write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))
    return judged_training(write_recipe, tmp_path)


@contextmanager
def killed_and_restarted(*, after: int, seconds: float) -> Iterator[str]:
    """A judge that goes away when it has been asked so many times, and comes back on the same port later."""
    done, enough = threading.Event(), threading.Event()
    count = iter(range(1, 10_000))

    def counting(body: dict[str, Any], before: int) -> Answer:
        if next(count) >= after:
            enough.set()
        return scores(body, before)

    ready = threading.Event()
    port: list[int] = []

    def serve() -> None:
        with ScriptedJudge(counting) as first:
            port.append(first.port)
            ready.set()
            enough.wait()
        done.wait(seconds)
        with ScriptedJudge(scores, port=port[0]):
            done.wait()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{port[0]}/v1"
    finally:
        enough.set()
        done.set()
        thread.join()


def test_an_outage_changes_nothing(train: Callable[..., Path]):
    with ScriptedJudge(scores) as server:
        calm = train("calm", server.url, cache=None)
    # 3 steps of 8 completions: the judge goes away in the second one.
    with killed_and_restarted(after=11, seconds=1.0) as url:
        stormy = train("stormy", url, cache=None)
    assert sum(row["rewards/judge/retries"] for row in reported_in_full(stormy)) > 0, "the outage was noticed"
    assert weights_of(calm) == weights_of(stormy)
    assert reported(calm) == reported(stormy)


def test_a_budget_stops_the_run_with_a_checkpoint_to_go_on_from(train: Callable[..., Path], tmp_path: Path):
    with ScriptedJudge(scores) as server:
        calm = train("calm", server.url, cache=None)
        # Two steps ask for 8 scores each, the third for more than one.
        with pytest.raises(BudgetError, match="budget of 17 requests is used up: 16 were made, 8 more are due"):
            train("short", server.url, cache=None, budget={"requests": 17})
        assert [path.name for path in (tmp_path / "short" / "checkpoints").iterdir()] == ["step-2"]
        # What was spent is remembered: 16 + 8 is 24.
        with pytest.raises(BudgetError, match="budget of 23 requests is used up: 16 were made, 8 more are due"):
            train("short", server.url, cache=None, budget={"requests": 23}, resume=True)
        short = train("short", server.url, cache=None, budget={"requests": 24}, resume=True)
    assert weights_of(calm) == weights_of(short)
    assert reported(calm) == reported(short)


def echoing(body: dict[str, Any], before: int) -> Answer:
    """A score, and the key that came with the question."""
    return said(f"7, asked with {KEY}", [("7", {"7": -0.5, KEY: -1.0})])


@pytest.mark.parametrize("script", [scores, echoing])
def test_the_key_is_nowhere_on_disk(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    with ScriptedJudge(script) as server:
        folder = train("run", server.url, endpoint={"api_key_env": "MY_JUDGE_KEY"})
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "MY_JUDGE_KEY" in (folder / "config.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "cache" / "judge.sqlite" in files
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_the_key_is_in_no_message(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    with (
        ScriptedJudge(lambda body, before: said(f"no score, {KEY}")) as server,
        pytest.raises(RewardError, match=r"no score from 1 to 10 in the judge's answer: 'no score, \*\*\*'"),
    ):
        train("run", server.url, endpoint={"api_key_env": "MY_JUDGE_KEY"})


def test_a_second_run_asks_nothing(train: Callable[..., Path]):
    with ScriptedJudge(scores) as server:
        first = train("first", server.url)
        asked = len(server.bodies)
        second = train("second", server.url)
    assert len(server.bodies) == asked
    assert weights_of(first) == weights_of(second)


def test_pairs_from_a_judge(train: Callable[..., Path]):
    def prefers_larger(body: dict[str, Any], before: int) -> Answer:
        first, second = (between(user_text(body), f"completion_{name}") for name in "ab")
        return said("A" if first > second else "B")

    with ScriptedJudge(prefers_larger) as server:
        folder = train("run", server.url, algorithm="online_dpo", mode="pairwise")
    rows = reported_in_full(folder)
    assert all(row["rewards/judge/tied_fraction"] == 0 for row in rows)
    assert all(row["pairs/tied_fraction"] == 0 for row in rows)
    # Four different completions are compared in six pairs and win 3, 2, 1 and 0 times.
    assert all(row["rewards/judge/mean"] == pytest.approx(0.5) for row in rows)


def test_what_a_judge_reports_is_documented(train: Callable[..., Path]):
    tokens = [("7", {"7": -0.5, "8": -1.0})]
    with ScriptedJudge(lambda body, before: said("7", tokens)) as server:
        scored = train("scored", server.url, price={"prompt": 1.0, "completion": 2.0})
    with ScriptedJudge(lambda body, before: said("A")) as server:
        compared = train("compared", server.url, mode="pairwise")
    keys = {key for folder in (scored, compared) for row in reported_in_full(folder) for key in row}
    found = {key.removeprefix("rewards/judge/") for key in keys if key.startswith("rewards/judge/")}
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("## Judges")[2].partition("\n## ")[0]
    assert found - {"mean", "std"} == set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))


def test_a_key_that_is_not_there_stops_before_anything_is_loaded(train: Callable[..., Path]):
    with pytest.raises(ConfigError, match="from the environment variable NO_SUCH_KEY, which is not set"):
        train("run", "http://127.0.0.1:9/v1", endpoint={"api_key_env": "NO_SUCH_KEY"})
