"""How many tokens another rounding of the logits changes, and what a draw costs: the library's, and the inverse CDF.

    python benchmarks/draws.py --precision fp32

The demo model answers the quickstart's held-out prompts twice with the same seeds, all at once and one group after
another, so that only rounding differs; then noise of known size is put on the logits. Both draws see the same
probabilities: the library's writes the text, the other one's token is only counted, up to the first token of a
completion that is another in the second pass. Draws are timed in turn within every step of the first pass.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import DEMO_MODEL, machine_facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dar.batch import Prompt
from dar.config.data import DataSpec, SourceSpec
from dar.config.model import ModelSpec
from dar.config.run import RuntimeSpec
from dar.data.prompts import prepare_prompts
from dar.data.sources import load_rows
from dar.policies.precision import resolve_precision
from dar.policies.text.loading import load_model, load_tokenizer
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import prompt_ids
from dar.record.environment import settle_heap
from dar.rollout.in_process import engine as in_process
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey, draw

PROMPTS, NUM_GENERATIONS, KEY = "package:dar/prompts/reviews_heldout.jsonl", 8, SamplingKey(0)
NOISE = (1e-5, 1e-3)
"""Standard deviations, in nats: what fp32 and what bf16 leave to chance, about."""
BLOCK = 256


def inverse_cdf(probabilities: Tensor, seeds: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds a uniform number, in two levels as well."""
    uniforms = (((seeds >> 11) & (2**53 - 1)).double() * 2.0**-53).unsqueeze(1)
    rows, vocabulary = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    cdf = blocks.sum(-1).double().cumsum(-1)
    threshold = uniforms * cdf[:, -1:]
    block = first_exceeding(cdf, threshold)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows), block.squeeze(1)].double().cumsum(-1)
    return (block * BLOCK + first_exceeding(inside, threshold - before)).squeeze(1)


def first_exceeding(cdf: Tensor, threshold: Tensor) -> Tensor:
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), side="left")
    return torch.searchsorted(cdf, threshold, side="right").minimum(last)


DRAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Gumbel-max": draw, "inverse CDF": inverse_cdf}


class Watched:
    """The engine's draw in one pass: draws both ways, and keeps what each token's seed gave."""

    def __init__(self, *, with_noise: bool) -> None:
        self.with_noise = with_noise
        self.tokens: dict[str, dict[int, int]] = {name: {} for name in DRAWS}
        self.changes: dict[tuple[str, float], int] = defaultdict(int)
        self.seconds: dict[str, float] = dict.fromkeys(DRAWS, 0.0)
        self.elsewhere = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, probabilities: Tensor, seeds: Tensor) -> Tensor:
        began, drawn = time.perf_counter(), {}
        for name, function in DRAWS.items():
            started = time.perf_counter()
            drawn[name] = function(probabilities, seeds)
            self.seconds[name] += time.perf_counter() - started
            self.tokens[name].update(zip(seeds.tolist(), drawn[name].tolist(), strict=True))
        for size in NOISE if self.with_noise else ():
            noisy = probabilities * (size * torch.randn(probabilities.shape, generator=self.generator)).exp_()
            for name, function in DRAWS.items():
                self.changes[name, size] += int((function(noisy, seeds) != drawn[name]).sum())
        self.elsewhere += time.perf_counter() - began
        return drawn["Gumbel-max"]


def main() -> None:
    args = parse_args()
    settle_heap()
    spec = ModelSpec(path=DEMO_MODEL)
    tokenizer = load_tokenizer(spec)
    precision = resolve_precision(RuntimeSpec(device="cpu", precision=args.precision))
    policy = Policy(load_model(spec), tokenizer, precision, temperature=1.0, with_reference=False)
    rows = load_rows(SourceSpec(path=PROMPTS))[: args.prompts]
    data = DataSpec(train=SourceSpec(path=PROMPTS))
    prompts = prepare_prompts(rows, partial(prompt_ids, tokenizer), data, max_prompt_length=None, where=PROMPTS).prompts
    together, seconds = sampled(policy, prompts, args.length, max_tokens=10**6)
    apart, _ = sampled(policy, prompts, args.length, max_tokens=1)
    console = Console(width=100)
    console.print(changed(together, apart, prompts, args))
    rest = seconds - together.elsewhere
    gumbel, inverse = together.seconds.values()
    console.print(
        f"of a pass {rest:.1f} s without draws: Gumbel-max {gumbel:.2f} s, inverse CDF {inverse:.2f} s; "
        f"the pass takes {(rest + gumbel) / (rest + inverse) - 1:+.1%}"
    )
    console.print(machine_facts())


def sampled(policy: Policy, prompts: Sequence[Prompt], length: int, *, max_tokens: int) -> tuple[Watched, float]:
    """What was drawn for completions with as many groups at once as fit `max_tokens`; one is always admitted."""
    engine, watched = InProcessEngine(max_tokens=max_tokens), Watched(with_noise=max_tokens > 1)
    engine.sync(policy, 0)
    in_process.draw = watched
    started = time.perf_counter()
    engine.generate(prompts, NUM_GENERATIONS, max_completion_length=length, key=KEY)
    return watched, time.perf_counter() - started


def changed(one: Watched, other: Watched, prompts: Sequence[Prompt], args: argparse.Namespace) -> Table:
    """Changes of both draws: between two passes, and by noise."""
    compared, counts = 0, dict.fromkeys(DRAWS, 0)
    for prompt in prompts:
        for completion in range(NUM_GENERATIONS):
            for seed in KEY.seeds(prompt.position, completion, args.length).tolist():
                if seed not in one.tokens["Gumbel-max"] or seed not in other.tokens["Gumbel-max"]:
                    break
                compared += 1
                for name in DRAWS:
                    counts[name] += one.tokens[name][seed] != other.tokens[name][seed]
                if one.tokens["Gumbel-max"][seed] != other.tokens["Gumbel-max"][seed]:
                    break
    table = Table(title=f"{len(prompts)} prompts × {NUM_GENERATIONS}, {args.precision}", title_justify="left")
    for heading in ("tokens changed, in 1,000", "of", *DRAWS):
        table.add_column(heading, justify="right" if table.columns else "left")

    def add(what: str, total: int, changes: Sequence[int]) -> None:
        table.add_row(what, f"{total:,}", *(f"{1000 * count / total:.2f}" for count in changes))

    add("one group after another", compared, list(counts.values()))
    for size in NOISE:
        add(f"noise of {size:g}", len(one.tokens["Gumbel-max"]), [one.changes[name, size] for name in DRAWS])
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a completion at most")
    return parser.parse_args()


if __name__ == "__main__":
    main()
