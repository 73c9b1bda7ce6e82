"""What the requests of a step came to."""

from __future__ import annotations

import math

from dar.config.judge import JudgePriceSpec


class Counts:
    """Counts since they were last drained.

    Args:
        price: of the tokens; without one there is no cost.
    """

    def __init__(self, price: JudgePriceSpec | None = None) -> None:
        self.price = price
        self._clear()

    def _clear(self) -> None:
        self.requests = 0
        self.retries = 0
        self.cache_hits = 0
        self.failures = 0
        self.parse_failures = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.latencies: list[float] = []

    def answered(self, *, latency: float, prompt_tokens: int, completion_tokens: int) -> None:
        """One request got its answer after `latency` seconds, earlier failed attempts not included."""
        self.latencies.append(latency)
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def drain(self) -> dict[str, float]:
        """The counts as metrics, and a new start. Latencies are absent where nothing was answered."""
        found: dict[str, float] = {
            "requests": self.requests,
            "retries": self.retries,
            "cache_hits": self.cache_hits,
            "failures": self.failures,
            "parse_failures": self.parse_failures,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
        if self.latencies:
            found |= {"latency_p50": percentile(self.latencies, 0.50), "latency_p95": percentile(self.latencies, 0.95)}
        if self.price is not None:
            found["cost"] = (
                self.prompt_tokens * self.price.prompt + self.completion_tokens * self.price.completion
            ) / 1e6
        self._clear()
        return found


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
