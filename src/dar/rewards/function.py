"""Calling a user's reward function, and refusing whatever it should not have returned."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dar.errors import ConfigError, DarError, RewardError
from dar.rewards.background import start_in_background
from dar.rewards.failure import Failed

Score = float | Failed | None
"""A reward, that there is none (`Failed`), or that the reward does not apply (`None`)."""

RewardFunction = Callable[..., Sequence[Score] | Awaitable[Sequence[Score]]]
"""`f(*, prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async (TRL's signature), where
a value may also be `Failed(reason)`."""


def load_function(path: str, *, what: str = "reward") -> Callable[..., Any]:
    """The function at `package.module:function`, looked for in the working directory too.

    Args:
        path: where it is.
        what: it is to be, for messages.

    Raises:
        ConfigError: the module does not import, or has no such callable.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{what} {path}: the module {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{what} {path}: the module {module_name} has no function '{attribute}'")
    return function


class Call:
    """A reward function that was called: a plain one is done, an asynchronous one runs until `result` asks for it.

    Args:
        name: of the reward, for messages.
        function: sync or async.
        arguments: everything on offer, of which it gets what it names; `completions` says how many values are due.
        where: for messages, such as `step 7`.

    Raises:
        RewardError: it raised.
    """

    def __init__(self, name: str, function: RewardFunction, arguments: Mapping[str, Any], *, where: str) -> None:
        self.name = name
        self._completions = arguments["completions"]
        self._where = where
        with self._naming_errors():
            self._values: Any = function(**accepted(function, arguments))
            if inspect.isawaitable(self._values):
                self._values = start_in_background(self._values)

    def result(self) -> list[Score]:
        """One finite float, `Failed` or None per completion.

        Raises:
            RewardError: it raised, returned too few or too many values, or one that is NaN, infinite or not a number;
                the message shows the row's completion.
        """
        values, name, completions, where = self._values, self.name, self._completions, self._where
        if isinstance(values, Future):
            with self._naming_errors():
                values = values.result()
        # Arrays and tensors are welcome; a string is a sequence too, but never a list of rewards.
        if hasattr(values, "tolist"):
            values = values.tolist()
        if isinstance(values, str | bytes) or not isinstance(values, Sequence):
            raise RewardError(
                f"reward '{name}' returned a {type(values).__name__} at {where}; expected {len(completions)} numbers"
            )
        if len(values) != len(completions):
            raise RewardError(
                f"reward '{name}' returned {len(values)} values for {len(completions)} completions at {where}"
            )
        return [_checked(name, value, row, completions[row], where) for row, value in enumerate(values)]

    def cancel(self) -> None:
        """Gives up what still runs."""
        if isinstance(self._values, Future):
            self._values.cancel()

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except DarError:
            raise  # it says already what, where and what to do
        except Exception as error:
            raise RewardError(
                f"reward '{self.name}' raised {type(error).__name__} at {self._where}: {error}"
            ) from error


def _checked(name: str, value: Any, row: int, completion: Any, where: str) -> Score:
    if value is None or isinstance(value, Failed):
        return value
    # An array of several values, where one is due, refuses and is then shown as it is.
    with contextlib.suppress(RuntimeError, ValueError):
        value = value.item() if hasattr(value, "item") else value
    number = finite_float(value)
    if number is None:
        shown = str(completion)
        shown = shown if len(shown) <= 300 else shown[:300] + "…"
        raise RewardError(
            f"reward '{name}' returned {value!r} for row {row} at {where}; every value must be a finite number, None "
            f"(does not apply) or Failed(reason). The completion was: {shown}"
        )
    return number


_LARGEST = 3.4e38
"""Rewards are kept in fp32, where anything larger would be infinite."""


def finite_float(value: Any) -> float | None:
    """The value as a float, or None where it is not a number that fp32 can hold."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        # Written so that NaN fails too.
        return number if abs(number) <= _LARGEST else None
    except OverflowError:
        return None  # an integer too large for a float


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of everything on offer, what a function names, or all of it where it takes `**kwargs`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}
