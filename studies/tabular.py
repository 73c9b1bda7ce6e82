"""The methods on policies that can be enumerated: drift and rewards are exact, and a run takes a quarter of a second.

    python -m studies.tabular tune OUT.json
    python -m studies.tabular confirm OUT.json --tuned TUNED.json

The library's own bundles weigh the batches and give the losses; only the model is a table, 8 prompts × 512 completions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dar.algorithms.base import Algorithm, UpdateTokens
from dar.assembly.algorithm import build_algorithm
from dar.batch import Batch, TokenGroups, TokenOutputs
from dar.config.algorithms import ALGORITHM_SPECS
from studies.frontier import area
from studies.methods import STRENGTHS, VARIANTS

FURTHEST = 4.0
"""KL up to which areas are taken, nats: log 512 = 6.2 is a table's own end."""
PROMPTS, COMPLETIONS, STEPS, GENERATIONS = 8, 512, 150, 4
RATES = (0.025, 0.05, 0.1, 0.2)
"""Adam's, on logits."""


@dataclass(frozen=True)
class World:
    """log π₀, the reward that is trained on and the one that is meant, [P, V] each.

    The proxy is the gold reward and an error with heavy tails (Student's t with 3 degrees of freedom): a few
    completions are worth much to the proxy alone, which is what an optimiser finds.
    """

    initial: Tensor
    proxy: Tensor
    gold: Tensor


def make_world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, COMPLETIONS)
    logits, gold, numerator, *parts = (torch.randn(shape, generator=generator) for _ in range(6))
    error = numerator / torch.stack(parts).square().mean(0).sqrt()
    return World(logits.log_softmax(1), gold + 0.7 * error, gold)


def run(world: World, settings: Mapping[str, Any], rate: float, seed: int) -> list[tuple[float, float, float]]:
    """Trains on samples; after every step KL to π₀, proxy and gold, exact means over the prompts.

    Args:
        settings: of the method, with `type`; `num_generations` where it is not 4, at equal completions a step.
        rate: Adam's.
        seed: of the samples.
    """
    settings = dict(settings)
    generations = settings.pop("num_generations", GENERATIONS)
    spec: Any = ALGORITHM_SPECS[settings["type"]](**settings)
    method = build_algorithm(spec, max_completion_length=1)
    logits = world.initial.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    curve = [_exact(world, logits)]
    for step in range(STEPS):
        count = PROMPTS * GENERATIONS // generations
        prompts = (torch.arange(count) + step * count) % PROMPTS
        _step(method, world, logits, optimizer, prompts, generations, generator)
        curve.append(_exact(world, logits))
    return curve


def _step(method: Algorithm, world: World, logits: Tensor, optimizer: torch.optim.Optimizer, prompts: Tensor,
          generations: int, generator: torch.Generator) -> None:  # fmt: skip
    old = logits.detach().log_softmax(1)
    drawn = torch.multinomial(old[prompts].exp(), generations, replacement=True, generator=generator)
    rows, columns = prompts.repeat_interleave(generations), drawn.flatten()
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    batch = Batch(
        TokenGroups(tuple((int(each),) for each in prompts), (generations,) * len(prompts), columns[:, None], mask),
        old_logprobs=old[rows, columns][:, None],
        ref_logprobs=world.initial[rows, columns][:, None],
        rewards=world.proxy[prompts[:, None], drawn],
        has_eos=mask[:, 0],
    )
    weighted, _ = method.weigh(batch)
    for _ in range(method.updates):
        current = logits.log_softmax(1)[rows, columns][:, None]
        if method.needs_ratios:
            advantages = weighted.advantages
            method.begin_update(
                UpdateTokens((current - batch.old_logprobs).detach()[:, 0], advantages, old[rows, columns])
            )
        terms = method.terms(TokenOutputs(current), weighted)
        optimizer.zero_grad()
        (terms.losses.sum() / weighted.denominator).backward()
        optimizer.step()
        method.finish_update({name: mean.value for name, mean in terms.means.items() if mean.count})


def _exact(world: World, logits: Tensor) -> tuple[float, float, float]:
    log_policy = logits.detach().log_softmax(1)
    policy = log_policy.exp()
    means = ((policy * each).sum(1).mean() for each in (log_policy - world.initial, world.proxy, world.gold))
    kl, proxy, gold = map(float, means)
    return kl, proxy, gold


def optimum(world: World, budget: float) -> float:
    """The best mean proxy of any policy at most so far from π₀: π ∝ π₀ e^(λr), one λ for all prompts, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _exact(world, world.initial + middle * world.proxy)[0] > budget else (middle, high)
    return _exact(world, world.initial + low * world.proxy)[1]


METHODS = [name for name in STRENGTHS if name != "dual_ppo"]
"""Without those that need a critic."""


def _settings(method: str, strength: Any) -> dict[str, Any]:
    fixed, name, _ = STRENGTHS[method]
    return {**fixed, name: strength}


def _outcome(job: tuple[str, dict[str, Any], float, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, settings, rate, seed = job
    world = make_world(seed)
    try:
        curve = run(world, settings, rate, seed)
    except (ValueError, ArithmeticError) as error:  # a run that breaks is a result
        return {"method": name, "settings": settings, "rate": rate, "seed": seed, "failed": str(error)}
    # Every fifth step: nothing is lost between them, and the file stays small.
    kl, proxy, gold = zip(*curve[::5], strict=True)
    rounded = {"kl": kl, "proxy": proxy, "gold": gold}
    return {"method": name, "settings": settings, "rate": rate, "seed": seed, "failed": None} | {
        key: [round(each, 4) for each in values] for key, values in rounded.items()
    }


def tuning_jobs(seeds: range) -> Iterator[tuple[str, dict[str, Any], float, int]]:
    for method in METHODS:
        for strength in STRENGTHS[method][2]:
            for rate in RATES:
                yield from ((method, _settings(method, strength), rate, seed) for seed in seeds)


def confirmation_jobs(tuned: Mapping[str, Any], seeds: range) -> Iterator[tuple[str, dict[str, Any], float, int]]:
    for method, found in tuned.items():
        yield from ((method, found["settings"], found["rate"], seed) for seed in seeds)
    dar = tuned["dar"]
    for name, changes in VARIANTS.items():
        yield from ((name, dar["settings"] | changes, dar["rate"], seed) for seed in seeds)


def choose(outcomes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the settings with the largest mean area under the proxy's frontier; a broken run counts as 0."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for each in outcomes:
        groups.setdefault((each["method"], json.dumps(each["settings"]), each["rate"]), []).append(each)
    best: dict[str, dict[str, Any]] = {}
    for (method, settings, rate), runs in groups.items():
        mean = sum(0.0 if each["failed"] else area(each["kl"], each["proxy"], FURTHEST) for each in runs) / len(runs)
        if method not in best or mean > best[method]["area"]:
            best[method] = {"settings": json.loads(settings), "rate": rate, "area": mean}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["tune", "confirm"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    if asked.stage == "tune":
        jobs = [*tuning_jobs(range(10_000, 10_000 + (asked.seeds or 5)))]
    else:
        jobs = [*confirmation_jobs(json.loads(asked.tuned.read_text()), range(asked.seeds or 200))]
    outcomes, started = [], time.monotonic()
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for outcome in pool.imap(_outcome, jobs, chunksize=8):
            outcomes.append(outcome)
            if sys.stderr.isatty() or len(outcomes) % 500 == 0:
                print(f"{len(outcomes)}/{len(jobs)} runs, {time.monotonic() - started:.0f} s", file=sys.stderr)
    found = choose(outcomes) if asked.stage == "tune" else outcomes
    asked.out.write_text(json.dumps(found, indent=1 if asked.stage == "tune" else None) + "\n")


if __name__ == "__main__":
    main()
