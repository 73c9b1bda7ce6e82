"""An oracle: a function that says of each completion whether it complies with given rules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from dar.errors import RewardError
from dar.rewards.function import Call

Oracle = Callable[..., Sequence[bool] | Awaitable[Sequence[bool]]]
"""`f(*, prompts, completions, completion_ids, **columns) -> list[bool]`, sync or async, called as rewards are."""


def ask_oracle(name: str, oracle: Oracle, arguments: Mapping[str, Any]) -> list[bool]:
    """One verdict per completion, True where it complies.

    Args:
        name: for messages.
        oracle: sync or async.
        arguments: everything on offer, of which it gets what it names; `completions` says how many verdicts are due.

    Raises:
        RewardError: it raised, returned too few or too many values, or one that is not a bool; the message shows the
            row's completion.
    """
    return [value is True for value in _Verdicts(name, oracle, arguments).result()]


class _Verdicts(Call):
    what, noun, due = "the oracle", "verdicts", "a list of {} bools"

    def _checked(self, value: Any, row: int) -> bool:
        if not isinstance(value, bool):
            raise RewardError(
                f"the oracle '{self.name}' returned {value!r:.120} for completion {row}; every verdict must be True "
                f"(it complies with the new rules) or False. The completion was: {self._completions[row]!s:.300}"
            )
        return value
