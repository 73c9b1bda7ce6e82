"""Beginning a run on a cluster: what must be so before Ray is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dar.config.run import RunSpec
from dar.errors import ConfigError, require_package

if TYPE_CHECKING:
    from dar.assembly.training import TrainResult


def train_on_cluster(spec: RunSpec, **settings: Any) -> TrainResult:
    """`dar.cluster.driver.train`. Raises ConfigError where Ray is not installed, or a launcher started this process."""
    require_package("ray", "a run on a cluster")
    assert spec.cluster is not None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("a run on a cluster starts its ranks itself (cluster.learners): start it without a launcher")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if spec.cluster.address == "local":
        # Whoever reaches Ray's ports can run what they like. This, made for other systems, has all of them on the
        # loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray's own 15 would have a run here wait for whatever else the machine does.
        os.environ.setdefault("RAY_worker_niceness", "0")
    from dar.cluster.driver import train  # noqa: PLC0415 - an extra, which reads these variables

    return train(spec, spec.cluster, **settings)
