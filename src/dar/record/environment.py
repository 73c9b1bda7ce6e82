"""What a run ran on: versions, source revision, processor. Nothing secret: no environment variable is recorded."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dar.policies.precision import Precision

_KERNELS_KEPT = "64"
# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_PACKAGES = ("dar-rlhf", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def describe_environment(precision: Precision, *, world_size: int) -> dict[str, Any]:
    """Facts for environment.json."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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


def settle_heap() -> None:
    """Makes freed tensors' memory reusable, where the C library is glibc. To be called before the first tensor is big.

    One heap for all threads: the forward pass runs in the main thread and the backward pass in autograd's, and with a
    heap each, what one frees the other cannot use. Tensors up to 32 MiB, glibc's largest limit, come from it, and what
    is freed stays in it: giving memory back to the system and mapping it again took a tenth of a step.

    torch also keeps a compiled kernel of every shape it has multiplied, up to 1024 of them, of half a megabyte each. A
    ragged batch has shapes of its own, which do not come again: enough are kept for one micro-batch's layers.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, _KERNELS_KEPT)
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    for parameter, value in (_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**31 - 1):
        libc.mallopt(parameter, value)


def release_freed_memory() -> None:
    """Gives what the heap keeps back to the system, where the C library is glibc. Getting it again costs seconds."""
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
