"""How many sampled tokens another batch shape changes: by the draw of the library, and by the inverse CDF.

    python benchmarks/draws.py --precision fp32

The demo model answers the quickstart's held-out prompts twice with the same seeds: all at once, and one group after
another. What differs is rounding, of other batch shapes, and a completion whose token has changed is another text from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from common import DEMO_MODEL, machine_facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dar.batch import Prompt, Rollouts
from dar.config.data import DataSpec, SourceSpec
from dar.config.model import ModelSpec
from dar.config.run import RuntimeSpec
from dar.data.prompts import prepare_prompts
from dar.data.sources import load_rows
from dar.policies.precision import resolve_precision
from dar.policies.text.loading import load_model, load_tokenizer
from dar.policies.text.policy import Policy
from dar.rollout.in_process import engine as in_process
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey

PROMPTS, NUM_GENERATIONS, LENGTH = "package:dar/prompts/reviews_heldout.jsonl", 8, 48
Draw = Callable[[Tensor, Tensor], Tensor]


def inverse_cdf(probabilities: Tensor, seeds: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds a uniform number, in float64."""
    uniforms = ((seeds >> 11) & (2**53 - 1)).double() * 2.0**-53
    cdf = probabilities.double().cumsum(1)
    return torch.searchsorted(cdf, uniforms.unsqueeze(1) * cdf[:, -1:], side="right").squeeze(1)


def main() -> None:
    args = parse_args()
    spec = ModelSpec(path=DEMO_MODEL)
    tokenizer = load_tokenizer(spec)
    precision = resolve_precision(RuntimeSpec(device="cpu", precision=args.precision))
    policy = Policy(load_model(spec), tokenizer, precision, temperature=1.0, with_reference=False)
    rows = load_rows(SourceSpec(path=PROMPTS))[: args.prompts]
    data = DataSpec(train=PROMPTS)
    prompts = prepare_prompts(rows, tokenizer, data, max_prompt_length=None, where=PROMPTS).prompts
    table = Table(title=f"{len(prompts)} prompts × {NUM_GENERATIONS}, {args.precision}", title_justify="left")
    for heading in ("draw", "tokens until a change", "changes", "per 1,000", "completions changed"):
        table.add_column(heading, justify="right" if table.columns else "left")
    draws: dict[str, Draw] = {"perturbed (the library's)": in_process.draw, "inverse CDF": inverse_cdf}
    for name, draw in draws.items():
        in_process.draw = draw
        together, apart = (sampled(policy, prompts, max_tokens) for max_tokens in (10**6, 1))
        compared, changes = differences(together, apart)
        share = changes / (len(prompts) * NUM_GENERATIONS)
        table.add_row(name, f"{compared:,}", str(changes), f"{1000 * changes / compared:.2f}", f"{share:.1%}")
    console = Console(width=100)
    console.print(table)
    console.print(machine_facts())


def sampled(policy: Policy, prompts: Sequence[Prompt], max_tokens: int) -> Rollouts:
    """Completions with as many groups at once as fit `max_tokens`; one is always admitted."""
    engine = InProcessEngine(max_tokens=max_tokens)
    engine.sync(policy, 0)
    return engine.generate(prompts, NUM_GENERATIONS, max_completion_length=LENGTH, key=SamplingKey(0))


def differences(one: Rollouts, other: Rollouts) -> tuple[int, int]:
    """Tokens up to each completion's first change, that one included, and how many completions have one."""
    compared = changes = 0
    pairs = ((rollouts.groups.completion_ids, rollouts.groups.mask) for rollouts in (one, other))
    (first, first_mask), (second, second_mask) = pairs
    for row in range(len(first)):
        ids, others = first[row][first_mask[row]].tolist(), second[row][second_mask[row]].tolist()
        same = [a == b for a, b in zip(ids, others, strict=False)]
        changes += not all(same)
        compared += same.index(False) + 1 if False in same else len(same)
    return compared, changes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--prompts", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
