"""The head's forward and backward pass by the size of its tiles, and how near its products come to the machine's limit.

    python benchmarks/head_tiles.py

The demo model's head (49,152 × 576) on one micro-batch's positions. The last row is 128 positions against the whole
vocabulary, as large as the head's portions were before there were tiles.
"""

from __future__ import annotations

import argparse

import torch
from common import machine_limits, median_seconds
from rich.console import Console
from rich.table import Table
from torch import nn

from dar.policies.text import head
from dar.record.environment import settle_heap

VOCABULARY, HIDDEN, TOKENS = 49_152, 576, 750
TILES = ((1024, 1024), (1024, 2048), (1024, 4096), (512, 4096), (128, VOCABULARY))


class Model(nn.Module):
    """As much of a language model as the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.config = self

    def get_output_embeddings(self) -> nn.Linear:
        return self.layer

    def get_text_config(self) -> Model:
        return self


def main() -> None:
    args = parse_args()
    settle_heap()
    model, states = Model(), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            return head.head_logprobs(model, states, targets, temperature=1.0)

    def both() -> None:
        forward().sum().backward()

    table = Table(title=f"{TOKENS} positions, {args.precision}", title_justify="left")
    for heading in ("positions × entries", "forward, s", "GFLOP/s", "and backward, s", "GFLOP/s"):
        table.add_column(heading, justify="right")
    product = 2 * TOKENS * VOCABULARY * HIDDEN / 1e9
    for positions, entries in TILES:
        head.POSITIONS, head.ENTRIES = positions, entries
        with torch.no_grad():
            one = median_seconds(forward, repeats=5)
        two = median_seconds(both, repeats=3)
        # The logits are computed again in the backward pass, which has two products more.
        rates = f"{product / one:.0f}", f"{4 * product / two:.0f}"
        table.add_row(f"{positions} × {entries:,}", f"{one:.2f}", rates[0], f"{two:.2f}", rates[1])
    console = Console(width=100)
    console.print(table)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in machine_limits().items()))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
