"""What ranks share: every rank samples and scores its own prompts, then all see the whole batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from dar.batch import Rollouts, joined
from dar.collective import gathered, num_ranks, own_rank
from dar.config.run import ComputeSpec
from dar.errors import DarError, RankError
from dar.policies.precision import Precision
from dar.rewards import RewardTable, join_tables

log = logging.getLogger(__name__)

Item = TypeVar("Item")

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


def own_share(items: Sequence[Item]) -> tuple[Sequence[Item], bool]:
    """This rank's items, and whether they are its own: one that is left without takes part with the first."""
    first, stop = own_groups(len(items))
    return (items[first:stop], True) if first < stop else (items[:1], False)


def join_ranks(runtime: ComputeSpec, precision: Precision, **settings: Any) -> Accelerator:
    """accelerate's view of ranks and device; the process group is made, where there are several ranks."""
    is_cpu = precision.device.type == "cpu"
    is_launched = is_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ
    is_launched |= os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    # accelerate takes the ten minutes of its own default for nothing said.
    timeout = timedelta(seconds=runtime.rank_timeout, microseconds=1)
    if is_initialized() and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()  # of another trainer in this process, such as TRL's: accelerate has one for all
    found = Accelerator(
        cpu=is_cpu,
        # Trainer, engine and reference share one autocast of their own.
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **settings,
    )
    if is_launched and found.num_processes == 1:
        log.warning(
            "this process trains alone: accelerate launch starts one on CPUs, whatever --num_processes says, and srun "
            "several that know nothing of each other. Ranks are started by: torchrun --nproc-per-node=N -m dar …"
        )
    return found


def leave_ranks() -> None:
    """Destroys the process group, if there is one; for the end of the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_ranks_named(runtime: ComputeSpec) -> Iterator[None]:
    """What torch says of ranks that cannot be reached, in words.

    Raises:
        RankError: another rank has ended, or did not answer within `runtime.rank_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DarError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            raise RankError(
                f"another rank did not answer for {runtime.rank_timeout:g} s (runtime.rank_timeout): it hangs, or is "
                "slow at what is its own (a reward, writing a model). If it only needs longer, raise that key"
            ) from error
        raise RankError(
            "another rank has ended, and none goes on alone. What it said stands above or below, how it ended in the "
            "launcher's table (exitcode -9 without a word: mostly that memory ran out)"
        ) from error
