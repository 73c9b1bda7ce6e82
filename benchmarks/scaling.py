"""How time and memory grow with prompt, completions per prompt, completion length, vocabulary and model size.

    python benchmarks/scaling.py --json OUT --plot OUT.png

Rollout, reference pass (no gradient) and update (forward, backward, AdamW) of one batch on randomly initialised Llamas;
one quantity varies, the others stay at the base. The passes are measured packed (each prompt once) and padded (the
plain way, `LogprobModel(..., packed=False)`), each batch in one micro-batch, so that memory shows what it costs. Every
measurement is a process of its own: the median of three calls after one to warm up, and the peak resident memory less
the resident memory before the first call (gradients and AdamW's state belong to the update).

The floor of a pass is the arithmetic that cannot be left out, each prompt once, attention included, at the GEMM
throughput of this machine. The floor of the rollout is that of its prompts' pass, plus for each token position the
larger of arithmetic and memory traffic: weights, keys and values read once, fp32 logits written and read once, at the
copy bandwidth. (Weights that stay in the processor's cache can be read faster than that.) Both limits are measured
before the first point, and again after the last. A growth of 1 is linear: the slope of log time (memory) against log
value, by least squares.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import machine_facts, machine_limits, median_seconds
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dar.algorithms.regression import DAR
from dar.batch import Batch, Prompt, TokenGroups
from dar.config.recipe import build_spec
from dar.config.regression import DARSpec
from dar.config.run import RuntimeSpec
from dar.learn.update import Updater
from dar.policies.precision import Precision, resolve_precision
from dar.policies.text.head import look_up_sparsely
from dar.policies.text.logprobs import LogprobModel
from dar.policies.text.policy import Policy
from dar.record.environment import settle_heap
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey

PHASES = (("rollout", True), ("reference", True), ("reference", False), ("update", True), ("update", False))
"""(phase, packed)"""


@dataclass(frozen=True)
class Point:
    """One workload: two prompts, all of one length, whose completions never end before the last position."""

    prompt_length: int = 128
    num_generations: int = 8
    completion_length: int = 64
    vocabulary: int = 32768
    hidden_size: int = 256
    num_layers: int = 6
    num_prompts: int = 2


SIZES = ((128, 3), (256, 6), (512, 8), (768, 12))
"""(hidden size, layers)"""

SERIES: dict[str, list[Point]] = {
    "prompt_length": [Point(prompt_length=n) for n in (64, 128, 256, 512, 1024)],
    "num_generations": [Point(num_generations=n) for n in (2, 4, 8, 16, 32)],
    "completion_length": [Point(completion_length=n) for n in (32, 64, 128, 256)],
    "vocabulary": [Point(vocabulary=n * 1024) for n in (8, 16, 32, 64, 128)],
    "num_parameters": [Point(hidden_size=width, num_layers=layers) for width, layers in SIZES],
}

_TINY = Point(16, 2, 8, 1024, 64, 1)
QUICK: dict[str, list[Point]] = {
    "prompt_length": [_TINY, replace(_TINY, prompt_length=32)],
    "num_generations": [_TINY, replace(_TINY, num_generations=4)],
    "completion_length": [_TINY, replace(_TINY, completion_length=16)],
    "vocabulary": [_TINY, replace(_TINY, vocabulary=2048)],
    "num_parameters": [_TINY, replace(_TINY, num_layers=2)],
}


# --- floors ----------------------------------------------------------------------------------------------------------


def key_heads(point: Point) -> int:
    """Heads of 64 for queries, half as many for keys and values."""
    return max(1, point.hidden_size // 128)


def body_weights(point: Point) -> int:
    """Weights of the linear layers outside the head."""
    hidden = point.hidden_size
    return point.num_layers * (2 * hidden * hidden + 2 * hidden * 64 * key_heads(point) + 3 * hidden * 3 * hidden)


def num_parameters(point: Point) -> int:
    """Weights of the linear layers and of the embedding, which the head shares."""
    return body_weights(point) + point.vocabulary * point.hidden_size


def attention_flops(point: Point, *, queries: int, keys: float) -> float:
    """Scores and weighted values of some queries that see so many keys on average: 2 FLOP each per key and feature."""
    return 4.0 * point.hidden_size * point.num_layers * queries * keys


def prompt_flops(point: Point) -> float:
    """Every prompt through the layers once."""
    tokens = point.num_prompts * point.prompt_length
    return 2.0 * tokens * body_weights(point) + attention_flops(point, queries=tokens, keys=point.prompt_length / 2)


def floor_seconds(point: Point, phase: str, limits: dict[str, float], precision: str) -> float:
    """The least time the arithmetic (and, token by token, the memory traffic) of a phase can take."""
    flops_per_second = limits[f"gemm_{precision}_gflops"] * 1e9
    body, head = body_weights(point), point.vocabulary * point.hidden_size
    rows, length = point.num_prompts * point.num_generations, point.completion_length
    if phase == "rollout":
        seconds = prompt_flops(point) / flops_per_second
        itemsize = 2 if precision == "bf16" else 4
        per_token = 2 * point.num_layers * 64 * key_heads(point) * itemsize
        for step in range(length):
            # The first token comes from the prompt's last state, without a pass through the layers.
            weights = head + (body if step else 0)
            flops = 2.0 * rows * weights
            traffic = weights * itemsize + 2 * rows * point.vocabulary * 4.0
            if step:
                flops += attention_flops(point, queries=rows, keys=point.prompt_length + step)
                traffic += (point.num_prompts * point.prompt_length + rows * step) * per_token
            seconds += max(flops / flops_per_second, traffic / (limits["copy_gb_per_s"] * 1e9))
        return seconds
    fed = rows * (length - 1)
    layers = prompt_flops(point) + 2.0 * fed * body
    layers += attention_flops(point, queries=fed, keys=point.prompt_length + length / 2)
    logits = 2.0 * rows * length * head
    # Backward costs twice the forward; the head's logits are computed again in it.
    flops = layers + logits if phase == "reference" else 3 * layers + 4 * logits
    return flops / flops_per_second


# --- one measurement, in a process of its own ------------------------------------------------------------------------


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one phase at one point."""
    function = prepare(Point(**job["point"]), job["phase"], packed=job["packed"], precision=job["precision"])
    before, peak_before = resident_bytes(), peak_bytes()
    seconds = median_seconds(function, repeats=3)
    peak = peak_bytes()
    # Where loading took more than the phase, its peak is all that is known: an upper bound.
    return {"seconds": seconds, "bytes": peak - before, "bytes_is_bound": peak <= peak_before}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class NoText:
    """Stands in for a tokenizer: the engine decodes what it sampled, and nobody reads it."""

    eos_token_id = 0

    def batch_decode(self, rows: Sequence[Any], **_: Any) -> list[str]:
        return [""] * len(rows)


def prepare(point: Point, phase: str, *, packed: bool, precision: str) -> Callable[[], Any]:
    """Everything but the phase itself; the call that is to be measured."""
    settle_heap()
    torch.manual_seed(0)
    compute = Precision(torch.device("cpu"), torch.bfloat16 if precision == "bf16" else torch.float32)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=point.vocabulary,
            hidden_size=point.hidden_size,
            intermediate_size=3 * point.hidden_size,
            num_hidden_layers=point.num_layers,
            num_attention_heads=point.hidden_size // 64,
            num_key_value_heads=key_heads(point),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=0,
        )
    ).eval()
    prompt_ids = torch.randint(point.vocabulary, (point.num_prompts, point.prompt_length)).tolist()
    num_rows = point.num_prompts * point.num_generations
    if phase == "rollout":
        policy = Policy(model, NoText(), compute, temperature=1.0, with_reference=False)
        policy.eos_token_ids = (-1,)  # no token is that, so every completion has its full length
        engine = InProcessEngine(max_tokens=10**9)
        engine.sync(policy, 0)
        prompts = [Prompt(index, "", tuple(ids), {}) for index, ids in enumerate(prompt_ids)]
        return lambda: engine.generate(
            prompts, point.num_generations, max_completion_length=point.completion_length, key=SamplingKey(0)
        )
    module = LogprobModel(model, temperature=1.0, packed=packed)
    assert module.is_packed == packed
    shape = (num_rows, point.completion_length)
    groups = TokenGroups(
        prompt_ids=tuple(map(tuple, prompt_ids)),
        group_sizes=(point.num_generations,) * point.num_prompts,
        completion_ids=torch.randint(point.vocabulary, shape),
        mask=torch.ones(shape, dtype=torch.bool),
    )
    if phase == "reference":

        @torch.no_grad()
        def reference() -> Any:
            with compute.compute():
                return module(groups)

        return reference
    look_up_sparsely(model)
    attention: Any = model.config._attn_implementation
    policy = Policy(model, NoText(), compute, temperature=1.0, with_reference=False)
    # The policy packs where it can; what is measured is the module, with the attention it was made with.
    model.set_attn_implementation(attention)
    policy.trained = module
    recipe = {"model": "-", "data": "-", "rewards": ["sentiment"], "steps": 1, "output_dir": "-"}
    # What sampled the batch is made up, and no sampler is to be compared with.
    runtime = {"max_tokens_per_microbatch": 10**9, "max_logprob_gap": 1e9}
    spec = build_spec(recipe | {"runtime": runtime}, where="the benchmark")
    updater = Updater(policy, Accelerator(cpu=True, mixed_precision="no"), spec)
    scored = Batch(
        groups=groups,
        old_logprobs=torch.zeros(shape),
        ref_logprobs=torch.zeros(shape),
        rewards=torch.zeros(point.num_prompts, point.num_generations),
        has_eos=torch.ones(num_rows, dtype=torch.bool),
    )
    batch = scored.weighted(torch.linspace(-1, 1, num_rows), torch.ones(num_rows))
    algorithm = DAR(DARSpec())
    return lambda: updater.step(algorithm, batch, on_policy=True, where="the benchmark")


# --- the whole run ---------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    if args.job is not None:
        print(json.dumps(measure(json.loads(args.job)) if args.job != "machine" else machine()))
        return
    # This process stays small: on Linux a child's peak memory begins at that of the process it was started from.
    found = child("machine")
    limits, precision = found["limits"], args.precision or found["precision"]
    done: dict[Any, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "precision": precision,
        "machine": found["facts"],
        "limits_before": limits,
        "series": {},
    }
    series = QUICK if args.quick else SERIES
    for name in args.series or series:
        points, rows = series[name], []
        for point in points:
            value = num_parameters(point) if name == "num_parameters" else getattr(point, name)
            print(f"{name} {value:,}", file=sys.stderr)
            found = {"value": value, "point": asdict(point), "floors": {}}
            for phase, packed in PHASES:
                job = {"point": asdict(point), "phase": phase, "packed": packed, "precision": precision}
                key = (point, phase, packed)
                if key not in done:
                    done[key] = child(json.dumps(job))
                found[label(phase, packed)] = done[key]
                found["floors"][phase] = floor_seconds(point, phase, limits, precision)
            rows.append(found)
        result["series"][name] = {"points": rows, "growth": growth(rows)}
    result["limits_after"] = child("machine")["limits"]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


def label(phase: str, packed: bool) -> str:
    return phase if packed else f"{phase}, padded"


LABELS = tuple(label(phase, packed) for phase, packed in PHASES)


def child(job: str) -> dict[str, Any]:
    """Runs this file on one job and reads the last line it prints."""
    found = subprocess.run([sys.executable, __file__, "--job", job], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Facts and limits of the machine, and the precision a run would choose on it."""
    dtype = resolve_precision(RuntimeSpec(device="cpu")).dtype
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return {"facts": machine_facts(), "limits": machine_limits(), "precision": precision}


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The exponents of time and memory, and the floor's."""
    values = [row["value"] for row in rows]
    found = {
        name: {
            "seconds": slope(values, [row[name]["seconds"] for row in rows]),
            "bytes": slope(values, [max(row[name]["bytes"], 1) for row in rows]),
        }
        for name in LABELS
    }
    for phase in ("rollout", "reference", "update"):
        found[f"{phase}, floor"] = {"seconds": slope(values, [row["floors"][phase] for row in rows])}
    return found


def slope(values: Sequence[float], measured: Sequence[float]) -> float:
    """Least squares on logarithms."""
    xs, ys = [math.log(value) for value in values], [math.log(value) for value in measured]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys)) / sum((x - x_mean) ** 2 for x in xs)


def show(result: dict[str, Any]) -> None:
    console = Console()
    for name, series in result["series"].items():
        table = Table(title=f"{name} ({result['precision']}): seconds (× its floor), MB", title_justify="left")
        table.add_column(name, justify="right")
        for each in LABELS:
            table.add_column(each, justify="right")
        for row in series["points"]:
            cells = []
            for phase, packed in PHASES:
                found = row[label(phase, packed)]
                bound = "≤ " if found["bytes_is_bound"] else ""
                ratio = found["seconds"] / row["floors"][phase]
                cells.append(f"{found['seconds']:.3g} ({ratio:.1f} ×), {bound}{found['bytes'] / 1e6:.0f}")
            table.add_row(f"{row['value']:,}", *cells)
        exponents = [series["growth"][each] for each in LABELS]
        table.add_row("growth", *(f"{found['seconds']:.2f}, {found['bytes']:.2f}" for found in exponents))
        console.print(table)


def plot(result: dict[str, Any], file: Path) -> None:
    """A row of panels per series: the seconds of each phase, and the memory of all."""
    series = result["series"]
    figure = Figure(figsize=(17, 3.6 * len(series)))
    panels = figure.subplots(len(series), 4, squeeze=False)
    for (name, found), row in zip(series.items(), panels, strict=True):
        values = [point["value"] for point in found["points"]]
        for phase, panel in zip(("rollout", "reference", "update"), row):
            for each in (each for each in LABELS if each.partition(",")[0] == phase):
                panel.plot(values, [point[each]["seconds"] for point in found["points"]], marker="o", label=each)
            floors = [point["floors"][phase] for point in found["points"]]
            panel.plot(values, floors, linestyle=":", color="gray", label="floor")
            panel.set(ylabel="seconds", title=phase)
        for index, each in enumerate(LABELS):
            line = "--" if each.endswith("padded") else "-"
            megabytes = [point[each]["bytes"] / 1e6 for point in found["points"]]
            row[3].plot(values, megabytes, line, marker="o", color=f"C{(index + 1) // 2}", label=each)
        row[3].set(ylabel="MB", title="peak memory of the phase")
        for panel in row:
            panel.set(xscale="log", yscale="log", xlabel=name)
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.set_xticks([], minor=True)
            panel.grid(visible=True, which="both", alpha=0.3)
            panel.legend(fontsize=8)
    figure.suptitle(f"{result['machine']['processor']}, {result['machine']['threads']} threads, {result['precision']}")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(file, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw it (PNG)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: what a run would choose here")
    parser.add_argument("--series", nargs="+", choices=tuple(SERIES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="two tiny points of each series, to try the script")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
