"""The spec of who takes part in a run on a Ray cluster."""

from __future__ import annotations

from dar.config.base import Count, Spec


class ClusterSpec(Spec):
    """Learners, samplers and reward workers as actors of a Ray cluster (`pip install 'dar-rlhf[ray]'`)."""

    shorthand = "address"

    address: str = "local"
    """`local` (a cluster on this machine, started and stopped with the run), `auto` (the one that this machine is part
    of) or `ray://host:port`."""
    learners: Count = 1
    """Ranks that train together."""
    samplers: Count = 1
    """Processes that sample, each with the recipe's engine and all of the policy's weights."""
    reward_workers: Count = 1
    """Processes that score completions."""
