"""Rewards of what can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.handmade import make_rollouts

from dar.config.reward import RewardSpec
from dar.config.verifiable import MathRewardSpec, SandboxedRewardSpec
from dar.errors import ConfigError, RewardError
from dar.rewards import Failed, Reward, RewardSet, RewardTable, builtin, verifiable

LIMITS: Any = {"workers": 1, "timeout_seconds": 60, "memory_gb": 1.0}


def scored(function: Any, texts: list[str], *, drop: bool = False, **columns: Any) -> RewardTable:
    """One prompt per text."""
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(texts))]
    reward = Reward("check", function, RewardSpec(on_failure="drop" if drop else "raise", max_failed_share=0.5))
    others = Reward("always", lambda completions: [0.0] * len(completions))
    return RewardSet([reward, others]).score(make_rollouts([[text] for text in texts], columns=rows), where="step 1")


def values(table: RewardTable) -> list[float | None]:
    return [None if value != value else value for value in table.parts["check"].flatten().tolist()]


def test_mathematics_in_a_sandbox() -> None:
    reward = verifiable.math(MathRewardSpec(**LIMITS))
    texts = ["The answer is 18.", "So 17", r"\boxed{\frac{1}{2}}", "whatever"]
    table = scored(reward, texts, answer=["9 * 2 = 18\n#### 18", "#### 18", "0.5", None])
    assert values(table) == [1.0, 0.0, 1.0, None]
    with pytest.raises(RewardError, match="the data has no column 'answer', which this reward reads; it has: gold"):
        scored(reward, ["18"], gold=["18"])


def test_unreadable_gold_answer_names_itself() -> None:
    reward = verifiable.math(MathRewardSpec(**LIMITS))
    with pytest.raises(RewardError, match="no answer can be read from the gold answer"):
        scored(reward, ["18"], answer=["####"])


def test_failed_verifier_costs_one_completion() -> None:
    reward = verifiable.sandboxed(SandboxedRewardSpec(function="support.verifiers:behave", **LIMITS))
    table = scored(reward, ["a", "exit", "bbb"], drop=True, answer=["", "", ""])
    assert values(table) == [1.0, None, 3.0]
    assert table.total.isnan().flatten().tolist() == [False, True, False]
    assert table.metrics()["rewards/check/failed_fraction"] == pytest.approx(1 / 3)
    with pytest.raises(RewardError, match=r"support\.verifiers:behave: its process was ended by exit code 3"):
        scored(reward, ["a", "exit"], answer=["", ""])


def test_failed_is_the_value_a_row_gets() -> None:
    reward = verifiable.sandboxed(SandboxedRewardSpec(function="support.verifiers:behave", **LIMITS))
    assert reward(completions=["exit"], answer=[""]) == [
        Failed("support.verifiers:behave: its process was ended by exit code 3")
    ]


@pytest.mark.parametrize(
    ("strictness", "credit", "expected"),
    [
        ("strict", "share", [0.5, 0.0, None]),
        ("strict", "all", [0.0, 0.0, None]),
        ("loose", "share", [0.5, 1.0, None]),
        ("loose", "all", [0.0, 1.0, None]),
    ],
)
def test_ifeval(strictness: Any, credit: Any, expected: list[float | None]) -> None:
    texts = ["no comma", 'Well, here:\n"quoted"', "anything"]
    ids = [["punctuation:no_comma", "startend:quotation"]] * 2 + [None]
    table = scored(
        verifiable.ifeval(strictness=strictness, credit=credit),
        texts,
        instruction_id_list=ids,
        kwargs=[[{}, {}], [{}, None], None],
    )
    assert values(table) == expected


def test_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}))
    texts = ['{"n": 1}', '```json\n{"n": 1}\n```', '{"n": "1"}', "{}", "n: 1", "[" * 100_000]
    assert values(scored(verifiable.json_schema(str(path)), texts)) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": "strange"}', "is not a JSON schema: 'strange' is not valid"),
        ("{a: [", "is not YAML that can be read"),
        ("$schema: [1]", "expected a mapping"),
        ("", "is not a JSON schema: expected a mapping, found None"),
    ],
)
def test_schema_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        verifiable.json_schema(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        verifiable.json_schema(str(tmp_path / "missing.json"))


def test_references_to_addresses_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **_: asked.append(arguments))
    path = tmp_path / "schema.json"
    path.write_text('{"$ref": "http://schemas.invalid/object.json"}')
    with pytest.raises(RewardError, match="Unresolvable"):
        scored(verifiable.json_schema(str(path)), ["{}"])
    assert asked == []


def test_format_counts_tags_in_their_place() -> None:
    texts = [
        "<think>a</think> so <answer>b</answer>",
        "<answer>b</answer><think>a</think>",  # the answer comes too early
        "<think>a</think><answer> </answer>",  # nothing in it
        "<think>a</think><think>b</think><answer>c</answer>",  # opened twice
        "<think>a<answer>b</answer></think>",  # inside the other
        "<think>a",
        "",
    ]
    assert values(scored(verifiable.tag_format(["think", "answer"]), texts)) == [1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]


def test_length_penalty_falls_linearly_from_buffer_to_limit() -> None:
    lengths = [0, 6, 7, 8, 10, 12]
    found = builtin.length_penalty(max_length=10, buffer=4)(completion_ids=[[0] * length for length in lengths])
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_token_cost() -> None:
    assert builtin.token_cost(0.5)(completion_ids=[[], [1, 2, 3]]) == [0.0, -1.5]
