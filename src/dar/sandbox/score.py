"""A score from code that is not ours, and what stands in place of one that could not be had."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

_LARGEST = 3.4e38
"""Rewards are kept in fp32, where anything larger would be infinite."""


@dataclass(frozen=True)
class Failed:
    """No score for this completion: a judge did not answer, a verifier hung. Never 0, and not `None` either, which says
    that the reward does not apply.

    reason: one sentence for messages and logs.
    """

    reason: str


def finite_float(value: Any) -> float | None:
    """The value as a float, or None where it is not a number that fp32 can hold."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        # Written so that NaN fails too.
        return number if abs(number) <= _LARGEST else None
    except OverflowError:
        return None  # an integer too large for a float
