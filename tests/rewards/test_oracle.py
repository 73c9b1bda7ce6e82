"""An oracle gives one bool per completion, or says loudly that it did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dar.errors import ConfigError, DataError, RewardError
from dar.rewards import ask_oracle, load_function

ARGUMENTS: dict[str, Any] = {"prompts": ["p", "p"], "completions": ["yes", "no"], "rule": ["a", "b"]}


def problem(oracle: Callable[..., Any]) -> str:
    with pytest.raises(RewardError) as caught:
        ask_oracle("rules", oracle, ARGUMENTS)
    return str(caught.value)


def test_oracle_gets_what_it_names():
    def first_rule(completions: list[str], rule: list[str]) -> list[bool]:
        return [completion == "yes" and each == "a" for completion, each in zip(completions, rule, strict=True)]

    assert ask_oracle("rules", first_rule, ARGUMENTS) == [True, False]
    seen: dict[str, Any] = {}

    def everything(**columns: Any) -> list[bool]:
        seen.update(columns)
        return [True, True]

    ask_oracle("rules", everything, ARGUMENTS)
    assert seen == ARGUMENTS


def test_oracle_may_be_asynchronous():
    async def slow(completions: list[str]) -> list[bool]:
        return [completion == "no" for completion in completions]

    assert ask_oracle("rules", slow, ARGUMENTS) == [False, True]


@pytest.mark.parametrize("values", [np.array([True, False]), torch.tensor([True, False]), (True, False)])
def test_arrays_are_welcome(values: Any):
    found = ask_oracle("rules", lambda: values, ARGUMENTS)
    assert found == [True, False]
    assert all(type(value) is bool for value in found)


def test_wrong_counts_and_types_are_refused():
    assert problem(lambda: [True]) == "the oracle 'rules' returned 1 verdicts; expected a list of 2 bools"
    assert problem(lambda: "yes") == "the oracle 'rules' returned a str; expected a list of 2 bools"
    assert problem(lambda: None) == "the oracle 'rules' returned a NoneType; expected a list of 2 bools"
    for value in (1, 0.7, None, "no"):
        assert problem(lambda value=value: [True, value]) == (
            f"the oracle 'rules' returned {value!r} for completion 1; every verdict must be True (it complies with the "
            "new rules) or False. The completion was: no"
        )


def test_an_oracle_that_raises_is_named():
    def broken(completions: list[str]) -> list[bool]:
        raise KeyError("rule 7")

    async def broken_later(completions: list[str]) -> list[bool]:
        raise KeyError("rule 7")

    for function in (broken, broken_later):
        assert problem(function).startswith("the oracle 'rules' raised KeyError: 'rule 7' (")

    def leaves(completions: list[str]) -> list[bool]:
        raise SystemExit(7)

    async def leaves_later(completions: list[str]) -> list[bool]:
        raise SystemExit(7)

    for function in (leaves, leaves_later):
        assert problem(function).startswith("the oracle 'rules' raised SystemExit: 7 (")

    def said(completions: list[str]) -> list[bool]:
        raise DataError("all is said")

    with pytest.raises(DataError, match="all is said"):
        ask_oracle("rules", said, ARGUMENTS)


def test_an_oracle_that_cannot_be_imported_is_called_an_oracle():
    with pytest.raises(ConfigError, match=r"^oracle no_such_module:ask: the module no_such_module cannot be imported"):
        load_function("no_such_module:ask", what="oracle")


def test_an_oracle_that_spoils_its_arguments_spoils_its_own():
    def spoil(completions: list[str], rule: list[str]) -> list[bool]:
        completions.clear()
        rule[0] = ""
        return [True, False]

    assert ask_oracle("rules", spoil, ARGUMENTS) == [True, False]
    assert ARGUMENTS == {"prompts": ["p", "p"], "completions": ["yes", "no"], "rule": ["a", "b"]}
