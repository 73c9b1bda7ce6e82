"""The order rows are drawn in: a function of seed and step, so that there is no iterator to save."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class ShuffledOrder:
    """Every epoch a new permutation of `num_rows` rows, `per_step` of them a step; nothing is drawn twice in an epoch.

    The permutation of epoch e is that of a Philox generator keyed by (seed, e).
    """

    num_rows: int
    per_step: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """Which rows are drawn in step `step` (from 0)."""
        return self.drawn(step * self.per_step, self.per_step)

    def drawn(self, first: int, count: int) -> list[int]:
        """Which rows are drawn as numbers first…first + count − 1 of all draws."""
        drawn, order, order_epoch = [], np.empty(0, dtype=np.int64), -1
        for position in range(first, first + count):
            epoch, index = divmod(position, self.num_rows)
            if epoch != order_epoch:
                generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
                order, order_epoch = generator.permutation(self.num_rows), epoch
            drawn.append(int(order[index]))
        return drawn

    def epoch(self, step: int) -> float:
        """Passes over the rows completed when step `step` begins."""
        return step * self.per_step / self.num_rows
