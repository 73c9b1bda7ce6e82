"""When to ask again: what the server says about waiting, and how long to wait where it says nothing."""

from __future__ import annotations

import contextlib
import email.utils
import math
import random
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with full jitter: attempt n waits U(0, min(longest, first · 2ⁿ)) seconds.

    Args:
        first: bound of the first wait, seconds.
        longest: bound of every wait, seconds.

    Full jitter spreads the clients that an outage has brought into step.
    """

    first: float = 0.5
    longest: float = 8.0
    # Its own generator: the global one belongs to whoever seeds it.
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def delay(self, attempt: int, retry_after: float | None) -> float:
        """Seconds to wait after failed attempt `attempt` (counted from 0); never less than the server asks for."""
        bound = min(self.longest, self.first * 2.0 ** min(attempt, 60))
        jitter = self._random.uniform(0.0, bound)
        return jitter if retry_after is None else retry_after + self._random.uniform(0.0, min(bound, self.first))


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds a `Retry-After` header asks for, given as seconds or as an HTTP date; None where it asks for nothing.

    RFC 9110, section 10.2.3. A date in the past asks for 0 seconds; what is neither is ignored.
    """
    if value is None:
        return None
    for read in (float, _seconds_until):
        with contextlib.suppress(ValueError, OverflowError):  # such as a day that no calendar has
            seconds = read(value)
            return max(0.0, seconds) if math.isfinite(seconds) else None
    return None


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
