"""What ranks share: every rank samples and scores its own prompts, then all see the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dar.batch import Rollouts, joined
from dar.collective import gathered, num_ranks, own_rank
from dar.rewards import RewardTable, join_tables

Scored = tuple[Rollouts, RewardTable, Tensor | None, Tensor | None]
"""Rollouts, what the rewards said of them, log π₀ and a critic's values, each where it is read."""


def gather_scored(own: Scored) -> Scored:
    """All ranks' rows on every rank, in rank order. One process: its own."""
    return own if num_ranks() == 1 else join_scored(gathered(own))


def join_scored(parts: Sequence[Scored]) -> Scored:
    """Several batches as one, padded to the longest completion."""
    rollouts, tables, references, values = zip(*parts)
    return joined(rollouts), join_tables(tables), joined(references), joined(values)


def own_groups(num_groups: int) -> tuple[int, int]:
    """(start, stop) of this rank's groups in the global batch; what is left over goes to the first ranks."""
    share, rest = divmod(num_groups, num_ranks())
    start = own_rank() * share + min(own_rank(), rest)
    return start, start + share + (own_rank() < rest)
