"""What every process of a run on a cluster is told, and what it says of itself."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import ray
import torch
from transformers.utils import logging as transformers_logging

from dar.assembly.objects import Objects
from dar.config.run import RunSpec
from dar.record.environment import settle_heap


@dataclass(frozen=True)
class Job:
    """A run, by a `name` no other has. folder: the driver's working directory. threads: of each process."""

    name: str
    spec: RunSpec
    objects: Objects
    folder: str
    threads: int

    def settle(self) -> None:
        """Makes the process that it is called in one of this run."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        torch.set_num_threads(self.threads)
        settle_heap()
        transformers_logging.disable_progress_bar()


def address() -> str:
    """Of the node that this process is on, or speaks to the cluster through."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)


def place() -> str:
    """Where this process is, for people."""
    return f"{platform.node()} ({address()}), process {os.getpid()}"
