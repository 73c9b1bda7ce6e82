"""The spec of who takes part in a run on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dar.config.base import Count, Positive, Spec


class ClusterSpec(Spec):
    """Learners, samplers and reward workers as actors of a Ray cluster (`pip install 'dar-rlhf[ray]'`)."""

    shorthand = "address"
    section = "cluster."

    address: Annotated[str, Field(pattern=r"^(local|auto|ray://.+:\d+)$")] = "local"
    """`local` (a cluster on this machine, started and stopped with the run), `auto` (the one that this machine is part
    of) or `ray://host:port`."""
    learners: Count = 1
    """Ranks that train together."""
    samplers: Count = 1
    """Processes that sample, each with the recipe's engine and all of the policy's weights."""
    reward_workers: Count = 1
    """Processes that score completions."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """How often the learners are started again from the last checkpoint, where one of them has died. Samplers and
    reward workers are replaced as often as they die."""
    patience: Positive = 300.0
    """Seconds within which the cluster must have room for every process, at the start and where one has died."""
