"""Several ranks, started as a user would: by torchrun, on CPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def on_ranks(*command: str, cwd: Path, num_ranks: int = 2) -> subprocess.CompletedProcess[bytes]:
    """Ranks that wait for each other for ever fail the test with the stacks they wait in.

    torchrun has the ranks print unbuffered into one pipe: a line is whole where it is written as one piece.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}")
    command = (sys.executable, *launcher, *command)
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command, env=os.environ | settings, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            for rank in psutil.Process(process.pid).children(recursive=True):
                rank.send_signal(signal.SIGABRT)
            output, _ = process.communicate(timeout=60)
            pytest.fail(f"the ranks did not end:\n{output.decode(errors='replace')}")
    return subprocess.CompletedProcess(command, process.returncode, output)


@contextmanager
def as_if_of(num_ranks: int) -> Iterator[None]:
    """This process as the first of so many ranks, the others of which send nothing: for counting, not for numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
