"""What ranks share: every rank samples and scores its own prompts, then all see the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dar.batch import Rollouts, joined
from dar.errors import DarError
from dar.rewards import RewardTable, join_tables


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Raises on every rank the error that one of them met, so that none waits for what will not come.

    Raises:
        DarError: its own of each rank that has one, on the others the first of them by rank.
    """
    own: DarError | None = None
    try:
        yield
    except DarError as error:
        own = error
    if accelerator.num_processes > 1:
        found: list[DarError | None] = gather_object([None if own is None else type(own)(str(own))])
        own = own or next((error for error in found if error is not None), None)
    if own is not None:
        raise own


Scored = tuple[Rollouts, RewardTable, Tensor | None, Tensor | None]
"""Rollouts, what the rewards said of them, log π₀ and a critic's values, each where it is read."""


def gather_scored(accelerator: Accelerator, own: Scored) -> Scored:
    """All ranks' rows on every rank, in rank order. One process: its own."""
    return own if accelerator.num_processes == 1 else join_scored(gather_object([own]))


def join_scored(parts: Sequence[Scored]) -> Scored:
    """Several batches as one, padded to the longest completion."""
    rollouts, tables, references, values = zip(*parts)
    return joined(rollouts), join_tables(tables), joined(references), joined(values)


def own_groups(num_groups: int, accelerator: Accelerator) -> tuple[int, int]:
    """(start, stop) of this rank's groups in the global batch; every rank has equally many."""
    share = num_groups // accelerator.num_processes
    return accelerator.process_index * share, (accelerator.process_index + 1) * share
