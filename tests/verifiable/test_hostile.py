"""Texts that are made to take forever: whatever reads a completion ends with them, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from test_ifeval import CASES

from dar.rewards import Failed, RewardFunction, builtin, verifiable
from dar.rewards.builtin import diversity
from dar.verifiable.ifeval import check_instructions
from dar.verifiable.maths import gold_text, last_tagged

N = 50_000
TEXTS = {
    "spaces": " " * N,
    "line breaks": "\n" * N,
    "one word": "a" * N,
    "brackets": "[" * N,
    "objects": '[{"a":' * N,
    "titles": "<<" * N,
    "tags": "<answer>" * N,
    "asterisks": "*" * N,
    "stops": "." * N + "x",
    "digits": "1" * N,
    "markers": "####" + " " * N,
    "fence": "```" + "\n" * N,
    "quotes": '"' * N,
    "accents": "é" * N,
    "half a surrogate pair": "\ud800 " * 100,
}
SECONDS = 60
"""Far more than any of them takes, and far less than backtracking does."""


@pytest.mark.parametrize("name", TEXTS)
def test_instructions_answers_and_rewards_end(name: str, tmp_path: Path) -> None:
    text, start = TEXTS[name], time.monotonic()
    for instruction, arguments in {case[0]: case[1] for case in CASES}.items():
        assert check_instructions(text, [instruction], [arguments]) in ([True], [False])
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array"}))
    rewards: list[RewardFunction] = [
        builtin.sentiment(),
        verifiable.tag_format(["think", "answer"]),
        verifiable.json_schema(str(tmp_path / "schema.json")),
    ]
    for reward in rewards:
        assert len(list(reward(completions=[text]))) == 1  # pyright: ignore[reportArgumentType]
    assert list(diversity(2)(completions=[text, text], group_ids=[0, 0])) == [0.0, 0.0]  # pyright: ignore[reportArgumentType]
    last_tagged(text)
    assert gold_text("18\n" + text[:N] + "\n18")
    assert time.monotonic() - start < SECONDS


def test_a_schema_whose_pattern_backtracks_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_MAX_SECONDS", 0.05)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "string", "pattern": "(a+)+$"}))
    found = verifiable.json_schema(str(path))(completions=[f'"{"a" * 50}!"', '"aaa"'])
    assert found == [Failed(f"the JSON schema {path} took longer than 0.05 s of processor time"), 1.0]
