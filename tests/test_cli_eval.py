"""`dar eval` on files that exist: tables, JSON, and errors as one paragraph."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import write_rows
from support.scripted_judge import ScriptedJudge, said, user_text

from dar.cli.app import main
from dar.sandbox.sandbox import Sandbox

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def dar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `dar` in this process: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["dar", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        found = capsys.readouterr()
        return caught.value.code, found.out, found.err

    return run


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Twelve annotations: the model wins nine, all of them with the longer output."""
    rows = [
        {
            "preference": 1.9 if number < 9 else 1.2,
            "output_1": "x" * 50,
            "output_2": "y" * (60 + number if number < 9 else 31 + number),
            "dataset": "koala" if number % 2 else "vicuna",
        }
        for number in range(12)
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = [
        {"input": "q", "output_1": "a" * (number + 1), "output_2": "bb", "label": 1, "subset": f"S{number % 2}"}
        for number in range(4)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def test_win_rate_as_json(dar: Run, annotated: Path):
    code, out, _ = dar("eval", "win-rate", "--annotations", annotated, "--length-controlled", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["win_rate"] == pytest.approx(100 * (9 * 0.9 + 3 * 0.2) / 12)
    assert (found["n_wins"], found["n_wins_base"], found["n_draws"], found["n_total"]) == (9, 3, 0, 12)
    assert found["discrete_win_rate"] == 75
    for name in ("win_rate_interval", "discrete_win_rate_interval", "length_controlled_interval"):
        low, high = found[name]
        assert 0 <= low < high <= 100
    assert found["length_controlled_winrate"] < found["win_rate"]
    assert found["length_controlled_fit"]["psi"] is None
    assert set(found["categories"]) == {"koala", "vicuna"}
    assert found["length"]["longer_wins"] == 100
    assert found["position"] is None


def test_win_rate_as_tables(dar: Run, annotated: Path):
    code, out, _ = dar("eval", "win-rate", "--annotations", annotated, "--length-controlled", "--resamples", "20")
    assert code == 0
    for words in (
        "72.50",
        "9 wins, 0 ties, 3 losses",
        "no difficulty term (no --instruction-difficulty)",
        "position bias: not known",
        "the longer one wins 100.0 % of 12 decided pairs",
        "koala",
    ):
        assert words in out


def test_win_rate_follows_difficulties(dar: Run, annotated: Path, tmp_path: Path):
    table = tmp_path / "instruction_difficulty.csv"
    table.write_text("index,instruction_difficulty\n" + "".join(f"{n},{n % 3}\n" for n in range(12)))
    options = ("--annotations", annotated, "--resamples", "20", "--instruction-difficulty", table)
    code, out, _ = dar("eval", "win-rate", *options, "--length-controlled", "--json")
    assert (code, json.loads(out)["length_controlled_fit"]["psi"] is None) == (0, False)
    code, _, err = dar("eval", "win-rate", *options)
    assert code == 2
    assert "add --length-controlled" in err


def test_agreement_as_json_and_tables(dar: Run, preferences: Path, tmp_path: Path):
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"pair": n, "score_1": n, "score_2": 1.5}) + "\n" for n in range(3)))
    code, out, _ = dar("eval", "agreement", preferences, "--choices", scores, "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    # Scores 0, 1 < 1.5 < 2, the label is always 1; lengths 1, 2, 3, 4 against 2.
    assert found["chosen"]["accuracy"] == pytest.approx(100 / 3)
    assert found["longer"]["accuracy"] == pytest.approx(100 * (0 + 0.5 + 1 + 1) / 4)
    assert found["num_unchosen"] == 1
    assert found["subsets"]["S1"]["longer"]["accuracy"] == 75
    code, out, _ = dar("eval", "agreement", preferences, "--choices", scores)
    assert code == 0
    assert re.search(r"choices\s+33\.3", out)
    assert re.search(r"longer wins \(characters\)\s+62\.5", out)
    assert "1 pairs have no choice and are left out" in out


def test_gsm8k_as_table_and_json(dar: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Checking answers has a time limit; what is shown must not depend on how busy the machine is.
    monkeypatch.setattr(Sandbox, "map", lambda self, requests: [float("2" in one["golds"][0]) for one in requests])
    questions = tmp_path / "gsm.jsonl"
    questions.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?", "answer": "#### 4"}\n')
    command = ("eval", "gsm8k", tiny_folder, questions, "--out", tmp_path / "e", "--max-tokens", "4")
    code, out, err = dar(*command)
    assert code == 0
    assert re.search(r"right\s+50\.0 .* 2\s", out)
    assert "model: 2 of 2" in err
    code, out, err = dar(*command, "--json")
    assert (code, json.loads(out)["percent"], json.loads(out)["n"]) == (0, 50, 2)
    assert "model:" not in err, "nothing is sampled again"


def test_ifeval_as_tables(dar: Run, tiny_folder: Path, tmp_path: Path):
    prompts = tmp_path / "if.jsonl"
    prompts.write_text('{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n')
    code, out, _ = dar("eval", "ifeval", tiny_folder, prompts, "--out", tmp_path / "e", "--max-tokens", "4")
    assert code == 0
    for words in ("prompts, strict", "instructions, loose", "by kind of instruction, strict", "punctuation"):
        assert words in out


def test_mt_bench_as_table_and_json(dar: Run, tiny_folder: Path, tmp_path: Path):
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        return write_rows(tmp_path / name, rows)

    single, multi = "{question} {answer}", "{question_1} {answer_1} {question_2} {answer_2}"
    templates = {
        "single-v1": single,
        "single-math-v1": single + "{ref_answer_1}",
        "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": multi + "{ref_answer_1} {ref_answer_2}",
    }
    fixed = {"system_prompt": "s", "output_format": "[[rating]]"}
    judge_prompts = [{"name": name, "prompt_template": text, **fixed} for name, text in templates.items()]
    questions = [
        {"question_id": 1, "category": "stem", "turns": ["a", "b"]},
        {"question_id": 2, "category": "math", "turns": ["c", "d"]},
    ]
    references = [{"question_id": 2, "choices": [{"turns": ["e", "f"]}]}]
    command = (
        *("eval", "mt-bench", "--model", tiny_folder, "--out", tmp_path / "e", "--max-tokens", "4"),
        *("--questions", write("question.jsonl", questions), "--references", write("gpt-4.jsonl", references)),
        *("--judge-prompts", write("judge_prompts.jsonl", judge_prompts), "--judge-model", "m"),
    )
    with ScriptedJudge(lambda body, before: said("?" if user_text(body).startswith("c") else "[[7]]")) as server:
        code, out, err = dar(*command, "--base-url", server.url)
        assert code == 0
        assert re.search(r"overall\s+7\.00\s+7\.00\s+7\.00\s+2\s+2", out)
        assert re.search(r"math\s+–\s+–\s+–\s+0\s+2", out)
        assert "2 answers of the judge hold no rating; what is not rated is left out of the means" in out
        assert "turn 2, temperature 0.1, model: 1 of 1" in err
        assert "judgements: 4 of 4" in err
    assert {body["max_tokens"] for body in server.bodies} == {2048}
    code, out, _ = dar(*command, "--base-url", server.url, "--json", "patience=1")
    found = json.loads(out)
    assert (code, found["num_unreadable"], found["overall"]["both"]["mean"]) == (0, 2, 7)
    assert found["categories"]["stem"]["second"]["num_ratings"] == 1
    code, _, err = dar(*command, "--base-url", "nonsense")
    assert code == 2
    assert "dar eval mt-bench: base_url: expected a URL such as http://127.0.0.1:8000/v1" in err
    renamed = "parameters={max_tokens: null, max_completion_tokens: 9}"
    code, _, err = dar(*command, "--base-url", server.url, renamed)
    assert code == 2
    assert "holds an evaluation with other settings" in err
    with ScriptedJudge(lambda body, before: said("[[7]]")) as server:
        assert dar(*command, "--out", tmp_path / "f", "--base-url", server.url, renamed)[0] == 0
    assert {(body.get("max_tokens"), body["max_completion_tokens"]) for body in server.bodies} == {(None, 9)}


def test_a_missing_file_is_one_paragraph(dar: Run, tmp_path: Path):
    code, _, err = dar("eval", "win-rate", "--annotations", tmp_path / "none.json")
    assert code == 2
    assert err.strip() == f"dar (DataError): the data file {tmp_path / 'none.json'} does not exist"


def test_lm_eval_that_is_missing_is_named_with_its_extra(dar: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("dar.errors.importlib.util.find_spec", lambda name: None)
    code, _, err = dar("eval", "lm-eval", "model", "--tasks", "piqa", "--out", tmp_path / "out")
    assert code == 2
    assert "dar eval lm-eval needs the package lm_eval: pip install 'dar-rlhf[lm-eval]'" in err


@pytest.mark.parametrize("command", ["win-rate", "agreement", "ifeval", "gsm8k", "lm-eval", "mt-bench"])
def test_help_teaches_by_example(dar: Run, command: str):
    code, out, _ = dar("eval", command, "--help")
    assert code == 0
    assert f"dar eval {command} " in out
