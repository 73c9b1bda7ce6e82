"""How much memory compiled kernels of ragged shapes take, with torch's defaults and as `dar` caps them.

    python benchmarks/kernel_memory.py

300 lengths of a batch, each multiplied with two layers' weights (forward, and the gradient of the states) in bf16; the
resident memory that has come on top after freed memory was given back. Each setting is a process of its own, because
the caches' sizes are read once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from dar.record.environment import release_freed_memory, settle_heap

WIDTHS = ((576, 1536), (1536, 576))


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] == "capped":
            settle_heap()
        print(f"{measure() / 1e6:.0f} MB, {sys.argv[1]}")
        return
    for setting in ("torch's defaults", "capped"):
        subprocess.run([sys.executable, __file__, setting], check=True)


def measure() -> int:
    """Bytes that multiplying 300 shapes left behind."""
    weights = [torch.randn(rows, columns).bfloat16() for rows, columns in WIDTHS]
    states = torch.randn(301, max(map(max, WIDTHS))).bfloat16()
    multiply(states, weights, 301)
    release_freed_memory()
    before = resident_bytes()
    for length in range(1, 301):
        multiply(states, weights, length)
    release_freed_memory()
    return resident_bytes() - before


def multiply(states: torch.Tensor, weights: list[torch.Tensor], length: int) -> None:
    for weight in weights:
        product = states[:length, : weight.shape[0]] @ weight
        product @ weight.T


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
