"""What a run ran on: versions, source revision, processor. Nothing secret: no environment variable is recorded."""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dar.policy.policy import Precision

_PACKAGES = ("dar-rlhf", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def describe_environment(precision: Precision, *, world_size: int) -> dict[str, Any]:
    """Facts for environment.json."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "device": str(precision.device),
        "compute_dtype": str(precision.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def peak_memory_gb() -> float:
    """The process's peak resident memory in GB (10⁹ bytes), since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def share_one_heap() -> None:
    """Lets all threads allocate from one heap, where the C library is glibc.

    The forward pass runs in the main thread and the backward pass in autograd's; with a heap each, what one frees the
    other cannot use. To be called before the first backward pass.
    """
    arena_max = -8  # M_ARENA_MAX of malloc.h
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(arena_max, 1)


def release_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library is glibc.

    Activations of ever-changing sizes otherwise leave holes in the heap, and resident memory creeps up step by step.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # an installed wheel has no repository
    return found.stdout.strip()


def processor_name() -> str:
    """The processor's name, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
