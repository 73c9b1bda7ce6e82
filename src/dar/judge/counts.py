"""What the requests of a step came to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dar.config.judge import JudgePriceSpec


@dataclass
class Counts:
    """Counts since they were last drained.

    price: of the tokens; without one there is no cost.
    latencies: seconds of the requests that were answered, earlier failed attempts not included.
    """

    price: JudgePriceSpec | None = None
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    failures: int = 0
    parse_failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies: list[float] = field(default_factory=list)

    def drain(self) -> dict[str, float]:
        """The counts as metrics, and a new start. Latencies are absent where nothing was answered."""
        found: dict[str, float] = {
            name: value for name, value in vars(self).items() if name not in ("price", "latencies")
        }
        if self.latencies:
            # The nearest rank: the smallest value that at least this share of the values does not exceed.
            middle, late = np.quantile(self.latencies, [0.50, 0.95], method="inverted_cdf").tolist()
            found |= {"latency_p50": middle, "latency_p95": late}
        if self.price is not None:
            spent = self.prompt_tokens * self.price.prompt + self.completion_tokens * self.price.completion
            found["cost"] = spent / 1e6
        vars(self).update(vars(Counts(self.price)))
        return found
