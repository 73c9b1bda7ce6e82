"""Rewards that see a prompt's completions together, such as which of them is best."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from dar.rewards.function import LOGGING, RewardFunction, RewardValue, accepted


def group_reward(function: Callable[..., Sequence[RewardValue]]) -> RewardFunction:
    """Makes a reward of a function that is to be called once per prompt, with that prompt's completions alone.

        @group_reward
        def shortest_wins(completions):
            shortest = min(map(len, completions))
            return [float(len(text) == shortest) for text in completions]

    Args:
        function: as any reward function, but every list it gets has one entry per completion of a single prompt.

    Returns:
        A reward function for the whole batch.
    """
    if inspect.iscoroutinefunction(function):
        raise TypeError("group_reward takes a plain function; an asynchronous one reads group_ids itself")
    if named := [name for name in LOGGING if name in inspect.signature(function).parameters]:
        raise TypeError(f"group_reward has no {named[0]}: a reward of the whole batch, which reads group_ids, has it")

    @functools.wraps(function)
    def score(group_ids: Sequence[int], **columns: Sequence[Any]) -> list[RewardValue]:
        scores: list[RewardValue] = []
        for group, rows in groupby(range(len(group_ids)), key=group_ids.__getitem__):
            members = list(rows)
            own = {name: [values[row] for row in members] for name, values in columns.items()}
            values = list(function(**accepted(function, own)))
            if len(values) != len(members):
                raise ValueError(f"{len(values)} values for the {len(members)} completions of group {group}")
            scores += values
        return scores

    # `wraps` makes the signature that of the function; what this one takes is everything.
    del score.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    return score
