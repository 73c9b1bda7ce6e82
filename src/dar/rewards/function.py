"""Calling a user's reward function, and refusing whatever it should not have returned."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dar.config.problems import quoted
from dar.errors import ConfigError, RewardError
from dar.files.hints import nearest_hint
from dar.files.imports import located
from dar.rewards.background import start_in_background
from dar.rewards.foreign import ForeignCode
from dar.sandbox.score import Failed, finite_float

RewardValue = float | Failed | None
"""A reward, that there is none (`Failed`), or that the reward does not apply (`None`)."""

RewardFunction = Callable[..., Sequence[RewardValue] | Awaitable[Sequence[RewardValue]]]
"""`f(*, prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async (TRL's signature), where
a value may also be `Failed(reason)`."""


def load_function(path: str, *, what: str = "reward") -> Callable[..., Any]:
    """The function at `package.module:function`, looked for in the working directory too, or `file.py:function`.

    Args:
        path: where it is.
        what: it is to be, for messages.

    Raises:
        ConfigError: the module does not import, or has no such callable.
    """
    folder, name, attribute = located(path)
    sys.path[:0] = [place for place in (folder, str(Path.cwd())) if place not in sys.path]
    with ForeignCode(
        lambda kind, said: ConfigError(f"{what} {path}: the module {name} cannot be imported: {kind}: {said}")
    ):
        module = importlib.import_module(name)
        function = getattr(module, attribute, None)
    loaded = vars(module).get("__file__")
    if path.rpartition(":")[0].endswith(".py") and loaded != str(Path(folder, f"{name}.py")):
        raise ConfigError(f"{what} {path}: another module {name} is loaded already, from {loaded}: rename the file")
    if not callable(function):
        has = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(
            f"{what} {path}: the module {name} has no callable '{attribute}'{nearest_hint(attribute, has)}; it has: "
            + (", ".join(has) or "none")
        )
    return function


LOGGING = ("log_extra", "log_metric", "trainer_state")
"""Arguments of TRL's that only a function which names them is given: they are no columns."""
OFFERED = ("prompts", "completions", "completion_ids", "finish_reasons", "group_ids", *LOGGING)
"""What a reward function may name, beside the columns of the data."""


def check_signature(function: Callable[..., Any], name: str, columns: Iterable[str]) -> None:
    """Raises ConfigError where a call by keyword, with these columns of the data, must fail."""
    with ForeignCode(lambda kind, said: ConfigError(f"reward '{name}' cannot be asked its arguments: {kind}: {said}")):
        needed = [p for p in inspect.signature(function).parameters.values()
                  if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    known = (*OFFERED, *sorted(columns))
    for each in needed:
        if each.kind is each.POSITIONAL_ONLY or each.name not in known:
            near = "" if each.name in known else nearest_hint(each.name, known)
            raise ConfigError(
                f"reward '{name}' takes {each.name}, which nobody passes{near}: it is called "
                f"by keyword, def f(completions, **columns), with those that it names of {', '.join(known)}"
            )


@dataclass
class Logged:
    """What a function says beside its values: columns of completions, and metrics of which all calls' mean counts."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.columns[column] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        if name.rpartition("/")[2] in ("mean", "std", "failed_fraction"):
            raise RewardError(f"log_metric('{name}'): every reward has a metric of that name; take another")
        self.metrics.setdefault(name, []).append(float(value))


def naming_errors(name: str, where: str) -> ForeignCode:
    """For calls of a reward's code: `reward 'short'`, ` at step 7`."""
    return ForeignCode(lambda kind, said: RewardError(f"{name} raised {kind}{where}: {said}"))


class Call:
    """A reward function that was called: a plain one is done, an asynchronous one runs until `result` asks for it.

    Args:
        name: of the reward, for messages.
        function: sync or async.
        arguments: everything on offer, of which it gets what it names; `completions` says how many values are due.
        where: for messages, such as `step 7`.
        state: what it gets where it names `trainer_state`; None where nothing is trained.

    Raises:
        RewardError: it raised.
    """

    what, noun, due = "reward", "values", "{} numbers, one for each completion: [score(c) for c in completions]"
    """For messages."""

    def __init__(self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any], *,
                 where: str = "", state: Any = None) -> None:  # fmt: skip
        self.name = name
        self._said = f"{self.what} '{name}'"
        self._completions = arguments["completions"]
        self._where = f" at {where}" if where else ""
        self.logged = Logged()
        with naming_errors(self._said, self._where):
            own = {"trainer_state": state, "log_extra": self.logged.log_extra, "log_metric": self.logged.log_metric}
            named = own.keys() & inspect.signature(function).parameters.keys()
            self._values: Any = function(**accepted(function, arguments) | {name: own[name] for name in named})
            if inspect.isawaitable(self._values):
                self._values = start_in_background(self._values)

    def result(self) -> list[RewardValue]:
        """One finite float, `Failed` or None per completion.

        Raises:
            RewardError: it raised, returned too few or too many values, or one that is NaN, infinite or not a number;
                the message shows the row's completion.
        """
        num_due, called = len(self._completions), f"{self._said} returned"
        expected = f"{self._where}; expected {self.due.format(num_due)}"
        with naming_errors(self._said, self._where):
            values = self._values.result() if isinstance(self._values, Future) else self._values
            # Arrays and tensors are welcome; a string is a sequence too, but never a list of values.
            if hasattr(values, "tolist"):
                values = values.tolist()
            if isinstance(values, str | bytes) or not isinstance(values, Sequence):
                raise RewardError(f"{called} a {type(values).__name__}{expected}")
            values = list(values)
            if len(values) != num_due:
                raise RewardError(f"{called} {len(values)} {self.noun}{expected}")
            for column, given in self.logged.columns.items():
                if len(given) != num_due:
                    raise RewardError(f"log_extra('{column}') of {self._said} got {len(given)} values{expected}")
            return [self._checked(value, row) for row, value in enumerate(values)]

    def cancel(self) -> None:
        """Gives up what still runs."""
        if isinstance(self._values, Future):
            self._values.cancel()

    def _checked(self, value: Any, row: int) -> RewardValue:
        if value is None or isinstance(value, Failed):
            return value
        # An array of several values, where one is due, refuses and is then shown as it is.
        with contextlib.suppress(RuntimeError, ValueError):
            value = value.item() if hasattr(value, "item") else value
        number = finite_float(value)
        if number is None:
            shown = str(self._completions[row])
            shown = shown if len(shown) <= 300 else shown[:300] + "…"
            raise RewardError(
                f"reward '{self.name}' returned {quoted(value)} for row {row}{self._where}; every value must be a "
                f"finite number, None (does not apply) or Failed(reason). The completion was: {shown}"
            )
        return number


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of everything on offer, what a function names, or all of it where it takes `**kwargs`.

    All is its own, each row too: whatever it does to its arguments, the next function, the record and the data keep
    theirs.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: _copied(value) for name, value in arguments.items() if takes_all or name in parameters}


_UNCHANGEABLE = (str, int, float, bool, bytes, type(None))


def _copied(value: Any) -> Any:
    """A copy all the way down; rows that are one object become several, which `deepcopy` alone would not do."""
    if type(value) is list:
        return [item if type(item) in _UNCHANGEABLE else _copied(item) for item in value]
    if type(value) is dict:
        return {key: item if type(item) in _UNCHANGEABLE else _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)
