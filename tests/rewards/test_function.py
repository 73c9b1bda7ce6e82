"""A reward function gets what it names, and must give back one finite number (or None) per completion."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dar.errors import ConfigError, RewardError
from dar.rewards.function import Call, RewardValue, load_function

ARGUMENTS: dict[str, Any] = {
    "prompts": ["p", "p"],
    "completions": ["good", "bad"],
    "completion_ids": [[1, 2], [3]],
    "finish_reasons": ["eos", "length"],
    "answer": ["x", "y"],
}


def call(function: Callable[..., Any]) -> list[RewardValue]:
    return Call("score", function, ARGUMENTS, where="step 7").result()


DUE = "numbers, one for each completion: [score(c) for c in completions]"


def refusal(function: Callable[..., Any]) -> str:
    with pytest.raises(RewardError) as caught:
        call(function)
    return str(caught.value)


# --- what it is given ------------------------------------------------------------------------------------------------


def test_function_gets_only_the_arguments_it_names():
    def score(answer: list[str], completions: list[str]) -> list[float]:
        return [float(len(a + c)) for a, c in zip(answer, completions, strict=True)]

    assert call(score) == [5.0, 4.0]


def test_function_that_takes_anything_gets_everything():
    seen: dict[str, Any] = {}

    def score(completions: list[str], **others: Any) -> list[float]:
        seen.update(others, completions=completions)
        return [0.0, 0.0]

    call(score)
    assert seen == ARGUMENTS


def test_defaults_of_arguments_nobody_offers_are_kept():
    assert call(lambda completions, bonus=3.0: [bonus] * len(completions)) == [3.0, 3.0]


def test_argument_nobody_offers_is_named():
    assert refusal(lambda completion: [0.0, 0.0]).endswith("missing 1 required positional argument: 'completion'")


def test_partials_methods_and_callable_objects_are_functions_too():
    class Scorer:
        def __call__(self, completions: list[str]) -> list[int]:
            return [len(completion) for completion in completions]

        def method(self, completion_ids: list[list[int]]) -> list[int]:
            return [len(ids) for ids in completion_ids]

    def scaled(completions: list[str], factor: float) -> list[float]:
        return [factor * len(completion) for completion in completions]

    assert call(Scorer()) == [4.0, 3.0]
    assert call(Scorer().method) == [2.0, 1.0]
    assert call(functools.partial(scaled, factor=0.5)) == [2.0, 1.5]


# --- what it gives back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5],
        (1.0, 2.5),
        np.array([1.0, 2.5]),
        np.array([1.0, 2.5], dtype=np.float32),
        [np.float32(1.0), np.float64(2.5)],
        torch.tensor([1.0, 2.5]),
        torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5)],
        pd.Series([1.0, 2.5], index=[7, 9]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_numbers_of_every_kind_become_floats(values: Any):
    found = call(lambda completions: values)
    assert found == [1.0, 2.5]
    assert all(type(value) is float for value in found)


def test_booleans_are_0_and_1():
    assert call(lambda completions: [True, np.bool_(False)]) == [1.0, 0.0]


def test_none_means_does_not_apply():
    assert call(lambda completions: [None, 1.0]) == [None, 1.0]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "0.5", [0.5], 1j, np.float64("nan"), torch.tensor(math.inf)]
)
def test_value_that_is_no_finite_number_is_refused_with_row_and_completion(value: Any):
    message = refusal(lambda completions: [0.0, value])
    shown = value.item() if hasattr(value, "item") else value
    assert message == (
        f"reward 'score' returned {shown!r} for row 1 at step 7; every value must be a finite number, None (does not "
        "apply) or Failed(reason). The completion was: bad"
    )


@pytest.mark.parametrize("array", [np.array([0.0, math.nan]), torch.tensor([0.0, math.nan])], ids=["numpy", "torch"])
def test_nan_inside_an_array_is_found(array: Any):
    assert "returned nan for row 1 at step 7" in refusal(lambda completions: array)


def test_column_instead_of_a_list_is_refused():
    assert "returned [0.0] for row 0" in refusal(lambda completions: torch.zeros(2, 1))


@pytest.mark.parametrize(
    "value", [10**400, torch.zeros(2), np.zeros(2)], ids=["integer beyond floats", "torch vector", "numpy vector"]
)
def test_value_that_cannot_become_one_float_is_refused(value: Any):
    assert "for row 1 at step 7" in refusal(lambda completions: [0.0, value])


def test_long_completion_is_shown_in_part():
    arguments = ARGUMENTS | {"completions": ["good", "b" * 1000]}
    with pytest.raises(RewardError, match=r"The completion was: b{300}…$"):
        Call("score", lambda completions: [0.0, math.nan], arguments, where="step 7").result()


TWO_DUE = "expected 2 numbers, one for each completion: [score(c) for c in completions]"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0], np.zeros(3), torch.zeros(1)], ids=str)
def test_too_few_or_too_many_values_are_counted(values: Any):
    message = refusal(lambda completions: values)
    assert message == f"reward 'score' returned {len(values)} values at step 7; {TWO_DUE}"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        (1.0, "float"),
        (np.float64(1.0), "float"),
        (torch.tensor(1.0), "float"),
        ("ab", "str"),
        ({"a": 1.0, "b": 2.0}, "dict"),
        ({1.0, 2.0}, "set"),
        ((number for number in (1.0, 2.0)), "generator"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_is_refused_by_its_kind(value: Any, kind: str):
    assert refusal(lambda completions: value) == f"reward 'score' returned a {kind} at step 7; expected 2 {DUE}"


def test_bytes_are_no_rewards():
    assert refusal(lambda completions: b"ab") == f"reward 'score' returned a bytes at step 7; expected 2 {DUE}"


def test_error_inside_the_function_is_named_and_kept_as_the_cause():
    def score(completions: list[str]) -> list[float]:
        raise KeyError("grade")

    with pytest.raises(RewardError, match=r"raised KeyError at step 7: 'grade' \(.*, line \d+, in score\)$") as caught:
        call(score)
    assert isinstance(caught.value.__cause__, KeyError)


class Wordless(BaseException):
    """Has no words, and asking for them ends everything."""

    def __str__(self) -> str:
        raise SystemExit(9)

    __repr__ = __str__


class OddText(str):
    def strip(self, *_: Any) -> str:
        raise SystemExit(9)


class OddWords(Exception):
    def __str__(self) -> str:
        return OddText("so")


NO_EXCEPTIONS = [
    (SystemExit(7), "SystemExit: 7"),
    (SystemExit(), "SystemExit: no message"),
    (KeyboardInterrupt(), "KeyboardInterrupt: no message"),
    (GeneratorExit("gone"), "GeneratorExit: gone"),
    (BaseException("bare"), "BaseException: bare"),
    (BaseExceptionGroup("several", [KeyboardInterrupt()]), "BaseExceptionGroup: several (1 sub-exception)"),
    (StopIteration("over"), "StopIteration: over"),
    (asyncio.CancelledError("away"), "CancelledError: away"),
    (Wordless(), "Wordless: no message"),
    (OddWords(), "OddWords: so"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "so"), "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in "),
]


def kind_at_step(said: str) -> str:
    """`reward 'score' raised KIND at step 7: WORDS`."""
    kind, words = said.split(": ", 1)
    return f"reward 'score' raised {kind} at step 7: {words}"


@pytest.mark.parametrize(("error", "said"), NO_EXCEPTIONS, ids=lambda value: type(value).__name__)
def test_whatever_a_function_raises_is_an_error_in_words(error: BaseException, said: str):
    def score(completions: list[str]) -> list[float]:
        raise error

    assert refusal(score).startswith(kind_at_step(said))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # Python itself turns it into a RuntimeError, and asyncio's own CancelledError becomes that of futures.
        pair
        for pair in NO_EXCEPTIONS
        if not isinstance(pair[0], StopIteration | asyncio.CancelledError)
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_an_async_function_raises_is_an_error_in_words_and_the_others_go_on(error: BaseException, said: str):
    async def score(completions: list[str]) -> list[float]:
        raise error

    waiting = Call("patient", lengths_soon, ARGUMENTS, where="step 7")
    assert refusal(score).startswith(kind_at_step(said))
    assert waiting.result() == [4.0, 3.0]
    assert call(lengths_later) == [4.0, 3.0]


def test_async_function_that_cancels_itself_or_leaves_a_task_that_exits():
    async def cancelled(completions: list[str]) -> list[float]:
        raise asyncio.CancelledError

    async def leaves_a_task(completions: list[str]) -> list[float]:
        async def leave() -> None:
            sys.exit(3)

        task = asyncio.create_task(leave())
        await asyncio.wait([task])
        return [float(isinstance(task.exception(), SystemExit))] * 2

    async def stops_the_loop(completions: list[str]) -> list[float]:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return [1.0, 1.0]

    assert refusal(cancelled) == "reward 'score' raised CancelledError at step 7: no message"
    assert call(leaves_a_task) == call(stops_the_loop) == [1.0, 1.0]
    assert call(lengths_later) == [4.0, 3.0]


def test_values_that_raise_when_they_are_looked_at_are_refused():
    class Odd(float):
        def __float__(self) -> float:
            raise Wordless

        __repr__ = __str__ = __float__  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    class Odder:
        def __repr__(self) -> str:
            raise Wordless

    class Array:
        def tolist(self) -> list[float]:
            sys.exit(7)

    class Longer(list[float]):
        def __len__(self) -> int:
            return 2

    said = "reward 'score' raised Wordless at step 7: no message"
    assert refusal(lambda completions: [0.0, Odd(1)]).startswith(f"{said} (")
    assert refusal(lambda completions: [0.0, Odder()]).startswith(said)
    assert "raised SystemExit at step 7: 7 (" in refusal(lambda completions: Array())
    assert refusal(lambda completions: Longer([1.0] * 3)) == f"reward 'score' returned 3 values at step 7; {TWO_DUE}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_a_function_is_an_interrupt(number: signal.Signals):
    def interrupted(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def score(completions: list[str]) -> list[float]:
        signal.raise_signal(number)
        return [1.0, 1.0]

    def hides_it(completions: list[str]) -> list[float]:
        try:
            return score(completions)
        except KeyboardInterrupt:
            raise ValueError("so") from None

    before = signal.signal(number, interrupted)
    try:
        for function in score, hides_it:
            with pytest.raises(KeyboardInterrupt):
                call(function)
            assert signal.getsignal(number) is interrupted
        # One that was only noted, as a run does with the first, interrupts nothing.
        noted: list[int] = []
        signal.signal(number, lambda number, _frame: noted.append(number))
        assert call(score) == [1.0, 1.0]
        assert noted == [number]
    finally:
        signal.signal(number, before)


def test_a_ctrl_c_while_an_async_function_is_waited_for_is_an_interrupt():
    async def score(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        return [1.0, 1.0]

    with pytest.raises(KeyboardInterrupt):
        call(score)


# --- what it does to its arguments is its own affair ------------------------------------------------------------------


def test_what_a_function_does_to_its_arguments_stays_with_it():
    def arguments() -> dict[str, Any]:
        prompt, row = [{"role": "user", "content": "p"}], {"tests": ["t"], "sizes": np.zeros(2), "pair": (["x"], 1)}
        return {
            "prompts": [prompt, prompt],
            "completions": [[{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]],
            "completion_ids": [[1, 2], [3]],
            "row": [row, row],
            "tags": [{"a", "b"}, bytearray(b"z")],
        }

    seen: list[int] = []

    def spoil(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt += completion  # a conversation, as many make it
            completion[0]["content"] = ""
            seen.append(len(prompt))
        completion_ids[0].append(9)
        completion_ids.pop()
        first = columns["row"][0]
        first["tests"].append("u")
        first["sizes"] += 1
        first["pair"][0].clear()
        columns["tags"][0].clear()
        columns["tags"][1] += b"y"
        assert columns["row"][1] == arguments()["row"][1] | {"sizes": columns["row"][1]["sizes"]}
        return [1.0, 1.0]

    given, whole = arguments(), arguments()
    for _ in range(2):
        assert Call("score", spoil, given, where="step 7").result() == [1.0, 1.0]
    # Prompts of one group are the same to begin with, and not one and the same.
    assert seen == [2, 2, 2, 2]
    sizes = [row.pop("sizes").tolist() for row in (given["row"][0], whole["row"][0])]
    assert sizes[0] == sizes[1]
    assert given == whole


# --- async -----------------------------------------------------------------------------------------------------------


async def lengths_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


async def lengths_soon(completions: list[str]) -> list[float]:
    await asyncio.sleep(0.05)
    return [float(len(completion)) for completion in completions]


async def failing_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    raise ValueError("judge is away")


def test_async_function_is_awaited():
    assert call(lengths_later) == [4.0, 3.0]


def test_async_function_works_inside_a_running_event_loop():
    async def notebook_cell() -> list[RewardValue]:
        return call(lengths_later)

    assert asyncio.run(notebook_cell()) == [4.0, 3.0]


def test_async_callable_object_is_awaited():
    class Judge:
        async def __call__(self, completions: list[str]) -> list[float]:
            return await lengths_later(completions)

    assert call(Judge()) == [4.0, 3.0]


def test_error_inside_an_async_function_is_named():
    said = refusal(failing_later)
    assert said.startswith("reward 'score' raised ValueError at step 7: judge is away (")
    assert said.endswith(", in failing_later)")


def test_error_inside_an_async_function_is_named_in_a_running_event_loop():
    async def notebook_cell() -> str:
        return refusal(failing_later)

    assert asyncio.run(notebook_cell()).startswith("reward 'score' raised ValueError at step 7: judge is away (")


def test_async_values_are_checked_like_any_others():
    async def score(completions: list[str]) -> list[float]:
        return [0.0, math.nan]

    assert "returned nan for row 1" in refusal(score)


# --- import paths ----------------------------------------------------------------------------------------------------


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_function_is_found_in_the_working_directory(working_folder: Path):
    (working_folder / "scores_here.py").write_text("def score(completions):\n    return [1.0 for _ in completions]\n")
    assert call(load_function("scores_here:score")) == [1.0, 1.0]


def test_missing_module_is_refused(working_folder: Path):
    with pytest.raises(ConfigError, match="reward no_such_module:score: the module no_such_module cannot be imported"):
        load_function("no_such_module:score")


def test_module_that_raises_is_refused_with_its_error(working_folder: Path):
    (working_folder / "scores_broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="scores_broken cannot be imported: ZeroDivisionError: division by zero"):
        load_function("scores_broken:score")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\nsys.exit(7)", "SystemExit: 7 (scores_odd.py, line 2, in <module>)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: no message (scores_odd.py, line 1, in <module>)"),
        ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "E: no message (scores_odd.py, line 3"),
        ("next(iter([]))", "StopIteration: no message (scores_odd.py, line 1, in <module>)"),
        ("def __getattr__(name): raise KeyError(name)", "KeyError: 'score'"),
    ],
)
@pytest.mark.parametrize("what", ["reward", "oracle"])
def test_whatever_a_module_raises_is_an_error_in_words(working_folder: Path, source: str, said: str, what: str):
    (working_folder / "scores_odd.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_function("scores_odd:score", what=what)
    expected = f"{what} scores_odd:score: the module scores_odd cannot be imported: {said}"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name", ["scroe", "CONSTANT"])
def test_missing_or_uncallable_function_is_refused(working_folder: Path, name: str):
    (working_folder / "scores_few.py").write_text("CONSTANT = 5\n")
    with pytest.raises(ConfigError, match=re.escape(f"the module scores_few has no callable '{name}'")):
        load_function(f"scores_few:{name}")


def test_missing_function_is_told_what_there_is(working_folder: Path):
    (working_folder / "scores_few.py").write_text(
        "from math import inf\ndef short(): ...\ndef _own(): ...\ndef long(): ...\n"
    )
    with pytest.raises(ConfigError, match=r"no callable 'shrt' \(did you mean 'short'\?\); it has: short, long$"):
        load_function("scores_few:shrt")


@pytest.mark.parametrize("path", ["inner/scores_file.py", "./inner/scores_file.py", "{here}/inner/scores_file.py"])
def test_function_of_a_file_is_loaded_with_what_lies_beside_it(working_folder: Path, path: str):
    (working_folder / "inner").mkdir()
    (working_folder / "inner" / "scores_beside.py").write_text("VALUE = 5.0\n")
    (working_folder / "inner" / "scores_file.py").write_text(
        "from scores_beside import VALUE\ndef score(completions):\n    return [VALUE] * len(completions)\n"
    )
    function = load_function(path.format(here=working_folder) + ":score")
    assert call(function) == [5.0, 5.0]


def test_file_that_cannot_be_loaded_is_named(working_folder: Path):
    (working_folder / "scores_mine.py").write_text("score = len\n")
    (working_folder / "json.py").write_text("score = len\n")
    with pytest.raises(ConfigError, match=r"^reward score_mine:f: .*No module named 'score_mine'$"):
        load_function("score_mine:f")
    with pytest.raises(
        ConfigError, match=r"^score_mine.py:f: score_mine.py does not exist \(did you mean 'scores_mine.py'"
    ):
        load_function("score_mine.py:f")
    with pytest.raises(
        ConfigError, match=r"^reward json.py:score: another module json is loaded already, from .*/json/"
    ):
        load_function("json.py:score")
