"""Calling a user's reward function, and refusing whatever it should not have returned."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from dar.errors import ConfigError, RewardError

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""`f(*, prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async (TRL's signature)."""


def load_function(path: str) -> RewardFunction:
    """The function at `package.module:function`, looked for in the working directory too.

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
            f"reward {path}: the module {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"reward {path}: the module {module_name} has no function '{attribute}'")
    return cast(RewardFunction, function)


def call_reward(name: str, function: RewardFunction, arguments: Mapping[str, Any], *, where: str) -> list[float | None]:
    """Calls a reward function with the arguments it names, and checks what comes back.

    Args:
        name: of the reward, for messages.
        function: sync or async.
        arguments: everything on offer; `completions` among it says how many values are due.
        where: for messages, such as `step 7`.

    Returns:
        One finite float, or None, per completion.

    Raises:
        RewardError: it raised, returned too few or too many values, or one that is NaN, infinite or not a number; the
            message shows the row's completion.
    """
    completions = arguments["completions"]
    try:
        values: Any = function(**_accepted(function, arguments))
        if inspect.isawaitable(values):
            values = _run(values)
    except Exception as error:
        raise RewardError(f"reward '{name}' raised {type(error).__name__} at {where}: {error}") from error
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


def _checked(name: str, value: Any, row: int, completion: Any, where: str) -> float | None:
    if value is None:
        return None
    # An array of several values, where one is due, refuses and is then shown as it is.
    with contextlib.suppress(RuntimeError, ValueError):
        value = value.item() if hasattr(value, "item") else value
    number = _finite_float(value)
    if number is None:
        shown = str(completion)
        shown = shown if len(shown) <= 300 else shown[:300] + "…"
        raise RewardError(
            f"reward '{name}' returned {value!r} for row {row} at {where}; every value must be a finite number or None "
            f"(None: does not apply). The completion was: {shown}"
        )
    return number


_LARGEST = 3.4e38
"""Rewards are kept in fp32, where anything larger would be infinite."""


def _finite_float(value: Any) -> float | None:
    """The value as a float, or None where it is not a number that fp32 can hold."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        # Written so that NaN fails too.
        return number if abs(number) <= _LARGEST else None
    except OverflowError:
        return None  # an integer too large for a float


def _accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _run(values: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await values

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook runs its own loop in this thread; asyncio refuses a second one here, but not in another thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()
