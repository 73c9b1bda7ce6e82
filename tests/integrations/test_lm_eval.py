"""lm-eval's tasks, by its own code: figures by hand, continued exactly, and a run that does not notice being asked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from support.rows import write_rows
from typer.testing import CliRunner

from dar.assembly.loop import build_loop
from dar.cli.app import app
from dar.config.data import LMEvalSpec
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.evaluate.commands import run_lm_eval
from dar.record.folder import RunFolder
from dar.trainer import run_loop

pytestmark = pytest.mark.integrations
pytest.importorskip("lm_eval", reason="lm-eval is not installed")

CHOICES = ["yes", "not", "low", "sun"]


def score(text: str, continuation: str) -> float:
    """log π(continuation | text) under the tiny model, in nats, by one plain pass."""
    tokens = make_tokenizer()(text + continuation, return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = make_model()(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
    return float(logprobs[-len(continuation) :].sum())


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten questions: of the first seven the gold answer is what the tiny model finds likeliest, of the others what it
    finds least likely."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = []
    for number in range(10):
        scores = [score(f"Question {number}?", f" {choice}") for choice in CHOICES]
        gold = scores.index((max if number < 7 else min)(scores))
        rows.append({"question": f"Question {number}?", "choices": CHOICES, "gold": gold})
    folder = tmp_path / "tasks"
    folder.mkdir()
    task: dict[str, Any] = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_rows(folder / "rows.jsonl", rows))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))
    generates = {
        "task": "said",
        "output_type": "generate_until",
        "doc_to_target": "?",
        "generation_kwargs": {"until": ["?"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    without_choices = {key: value for key, value in task.items() if key != "doc_to_choice"}
    (folder / "said.yaml").write_text(yaml.safe_dump(without_choices | generates))
    (folder / "away.yaml").write_text(yaml.safe_dump({**task, "task": "away", "dataset_path": "nobody/has-this"}))
    return folder


def test_figures_are_those_by_hand_and_continued_exactly(tiny_folder: Path, tasks: Path, tmp_path: Path):
    """Accuracy 7/10, and its standard error √(0.7 · 0.3 / 9)."""
    out = tmp_path / "out"
    line = ["eval", "lm-eval", str(tiny_folder), "--tasks", "letters,said", "--include-path", str(tasks), "--json"]
    found = CliRunner().invoke(app, [*line, "--out", str(out), "--batch-size", "2"])
    assert found.exit_code == 0, found.stderr
    whole = json.loads(found.stdout)
    assert whole["results"]["letters"]["acc,none"] == 0.7
    assert whole["results"]["letters"]["acc_stderr,none"] == pytest.approx((0.7 * 0.3 / 9) ** 0.5)
    assert whole["n-samples"]["said"]["effective"] == 10
    assert json.loads((out / "result.json").read_text()) == whole
    answers = (out / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(answer) for answer in answers]
    by_hand = [score("Question 3?", f" {choice}") for choice in CHOICES]
    assert [row["answer"][0] for row in rows[12:16]] == pytest.approx(by_hand, abs=1e-4)
    # As if killed after the first portion; one answer of it is altered, to see that none is asked for again.
    rows[0]["answer"][0] -= 1e6 if rows[0]["answer"][0] == max(row["answer"][0] for row in rows[:4]) else -1e6
    (out / "answers.jsonl").write_text("\n".join([json.dumps(rows[0]), *answers[1:32]]) + "\n")
    spec = LMEvalSpec(include_path=str(tasks), batch_size=2)
    notes: list[str] = []
    again = run_lm_eval(str(tiny_folder), ["letters", "said"], out, spec, 0, notes.append)
    assert again["results"]["letters"]["acc,none"] == 0.6
    assert notes == ["loglikelihood: 40 of 40", "generate_until: 10 of 10"]
    assert (out / "answers.jsonl").read_text().splitlines()[1:] == answers[1:]


def test_what_cannot_be_asked_is_said(tiny_folder: Path, tasks: Path, tmp_path: Path):
    def ask(name: str, **changes: Any) -> None:
        spec = LMEvalSpec(include_path=str(tasks)).model_copy(update=changes)
        run_lm_eval(str(tiny_folder), [name], tmp_path / "out", spec, 0, print)

    with pytest.raises(ConfigError, match=r"no task 'leters' \(did you mean 'letters'\?\)"):
        ask("leters")
    with pytest.raises(ConfigError, match=r"cannot load away: .*nobody/has-this.*HF_HUB_OFFLINE is honoured"):
        ask("away")
    with pytest.raises(ConfigError, match=r"none is no folder of lm-eval's tasks"):
        ask("letters", include_path=str(tmp_path / "none"))
    make_tokenizer(chat=False).save_pretrained(tiny_folder)
    (tiny_folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no chat template"):
        ask("letters", chat_template=True)


def test_run_that_is_watched_is_the_run_that_is_not(write_recipe: Callable[..., Path], tasks: Path, tmp_path: Path):
    """Steps large enough to unlearn anything. The score at the end is that of the saved model, and a run that goes on
    from a checkpoint finds the same."""
    alert = {"type": "retention", "task": "letters", "max_drop": 0.15, "include_path": str(tasks)}
    steps = {"steps": 4, "evaluation": {"every": 2}, "optim": {"type": "adamw", "learning_rate": 0.1}}

    def run(name: str, alerts: list[Any], *, resume: bool = False) -> RunFolder:
        spec = load_recipe(write_recipe(**steps, alerts=alerts, output_dir=str(tmp_path / name)))
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        run_loop(build_loop(spec, quiet=True, resume=resume), resume=resume, command="test")
        return RunFolder(tmp_path / name)

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.rand(), float(torch.rand(1))

    plain, was_drawn = run("plain", []), drawn()
    watched = run("watched", [alert])
    assert drawn() == was_drawn
    scores = {row["step"]: row["eval/retention/letters"] for row in watched.metrics() if "eval/time" in row}
    assert list(scores) == [0, 2, 4]
    assert scores[0] == 0.7
    (fired,) = watched.alerts()
    assert (fired["metric"], fired["threshold"]) == ("eval/retention/letters", -0.15)
    assert fired["value"] == pytest.approx(scores[fired["step"]] - 0.7)

    def weights(folder: RunFolder) -> bytes:
        return (folder.model / "model.safetensors").read_bytes()

    def trained(folder: RunFolder) -> list[dict[str, Any]]:
        rows = [row for row in folder.metrics() if "eval/time" not in row]
        return [{key: row[key] for key in row if "time" not in key and "memory" not in key} for row in rows]

    assert weights(watched) == weights(plain)
    assert trained(watched) == trained(plain)
    spec = LMEvalSpec(include_path=str(tasks))
    ours = run_lm_eval(str(watched.path), ["letters"], tmp_path / "out", spec, 0, print)
    assert ours["results"]["letters"]["acc,none"] == scores[4]

    (watched.checkpoints / "step-4").rename(tmp_path / "step-4")
    (watched.checkpoints / "step-3").rename(tmp_path / "step-3")
    again = run("watched", [alert], resume=True)
    assert {row["step"]: row["eval/retention/letters"] for row in again.metrics() if "eval/time" in row} == scores
    assert again.alerts() == [fired]
