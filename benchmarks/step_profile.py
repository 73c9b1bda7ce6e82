"""Where one step's time goes, operator by operator, and how near the matrix products come to the machine's limit.

    python benchmarks/step_profile.py --workload chat --json OUT
    python benchmarks/step_profile.py --workload tldr --prompts FILE.jsonl --algorithm dar --json OUT

(Not called profile.py: Python's own cProfile would import it instead of the standard library's module.)

Each phase's seconds stand beside what `dar plan --cluster-spec` would say of this machine: the formulas of
assembly/scaling.py at the GEMM and copy limits measured before, no share taken off.

The second step of a run is profiled phase by phase. Its own operators' time is sorted into kinds; what is left of the
wall time is Python, dispatch and idling. The update's useful arithmetic (6 FLOP per weight and token, 2 for the pass
that only reads) is divided by the phase's time *without* the profiler and compared with the GEMM limit of the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import DEMO_MODEL, chat_prompts, machine_facts, machine_limits, model_folder, tldr_prompts
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from dar.assembly.loop import build_loop
from dar.assembly.memory import StepShape, shape_of
from dar.assembly.objects import Objects
from dar.assembly.scaling import estimate
from dar.batch import pad_rows
from dar.config.hardware import HardwareSpec
from dar.config.recipe import build_spec
from dar.policies.text.logprobs import unwrapped
from dar.policies.text.policy import Policy
from dar.rollout.sampling import SamplingKey
from dar.run.loop import Loop

KINDS = {
    # Before the products: the kernels are called scaled_dot_product_….
    "attention": ("attention",),
    "matrix products": ("mm", "addmm", "bmm", "matmul", "linear", "mkldnn::", "baddbmm", "dot"),
    "softmax": ("softmax", "logsumexp", "exp", "log"),
    "copies and casts": ("copy_", "cat", "contiguous", "clone", "repeat"),
    "gather and scatter": ("index", "gather", "scatter", "select", "embedding", "masked", "where", "searchsorted"),
    "reductions": ("sum", "mean", "max", "min", "norm", "cumsum", "prod"),
    "element by element": ("mul", "add", "sub", "div", "neg", "silu", "pow", "sqrt", "sigmoid", "tanh", "fill", "zero"),
}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Cheap, and different for every completion."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def main() -> None:
    args = parse_args()
    prompts = (
        chat_prompts(args.model, args.num_prompts * 3)
        if args.workload == "chat"
        else tldr_prompts(args.model, args.prompts, args.num_prompts * 3)
    )
    limits = machine_limits()
    with tempfile.TemporaryDirectory() as folder:
        spec = build_spec(
            {
                "model": model_folder(args.model),
                "data": "prompts",
                "algorithm": args.algorithm,
                "rewards": [{"type": "function", "function": "benchmark:reward", "name": "reward"}],
                "sampling": {"max_completion_length": args.max_new_tokens},
                "prompts_per_step": args.num_prompts,
                "num_generations": args.num_generations,
                "steps": 3,
                "output_dir": f"{folder}/run",
                "runtime": {
                    "precision": args.precision,
                    "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
                    "compile_layers": args.compile_layers,
                },
            },
            where="the benchmark",
        )
        rows = [{"prompt": prompt} for prompt in prompts]
        loop = build_loop(spec, Objects(train_rows=rows, rewards={"reward": reward}), quiet=True)
        loop.step(1)
        phases = measure(loop, limits, args.precision)
    result = {
        "workload": args.workload,
        "algorithm": args.algorithm,
        "precision": args.precision,
        "compile_layers": args.compile_layers,
        "machine": machine_facts(),
        "limits_before": limits,
        "limits_after": machine_limits(),
        "phases": phases,
    }
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def on_paper(loop: Loop, prompts: Any, length: float, limits: dict[str, float], precision: str) -> dict[str, float]:
    """Seconds of the phases by formula, for completions of that length on average."""
    spec = loop.spec
    spec = spec.model_copy(update={"sampling": spec.sampling.model_copy(update={"max_completion_length": length})})
    policy, lengths = policy_of(loop), [len(prompt.token_ids) for prompt in prompts]
    config: Any = unwrapped(policy.model).config
    shape = shape_of(config)
    rate: dict[str, Any] = {
        "bf16_tflops": limits[f"gemm_{precision}_gflops"] / 1e3,
        "memory_gb_per_s": limits["copy_gb_per_s"],
    }
    nowhere: dict[str, Any] = {"link_gb_per_s": 1.0, "network_gb_per_s": 1.0}
    shares: dict[str, Any] = {"mfu": 1.0, "memory_bandwidth_share": 1.0, "network_share": 1.0, "memory_share": 1.0}
    hardware = HardwareSpec(devices=1, memory_gb=1e6, **rate, **nowhere, **shares)
    own = StepShape(tokens=0, last=0, microbatches=1, rows=0, length=0, prompts=0, trained=shape.total,
                    compute=policy.precision.dtype.itemsize)  # fmt: skip
    found = estimate(shape, own, spec, hardware, prompt_length=sum(lengths) / len(lengths), reads=1, updates=1,
                     generations=spec.num_generations)  # fmt: skip
    seconds = {name: phase.seconds for name, phase in found.phases.items()}
    return seconds | {"update": seconds["update"] + seconds["optimizer"]}


def measure(loop: Loop, limits: dict[str, float], precision: str) -> dict[str, Any]:
    """Each phase once without the profiler (its time) and once with it (its operators)."""
    spec, prompts = loop.spec, loop.collector.stream.at(1)
    budget = spec.runtime.max_tokens_per_microbatch

    loop.engine.sync(loop.learner.policy, 0)

    def rollout() -> Any:
        return loop.engine.generate(
            prompts,
            spec.num_generations,
            max_completion_length=spec.sampling.max_completion_length,
            key=SamplingKey(spec.seed, "train", 2),
        )

    rollouts = rollout()
    scored = rollouts.scored(torch.zeros(len(prompts), spec.num_generations), {}, ref_logprobs=rollouts.logprobs)
    num_rows = rollouts.groups.num_rows
    rows = scored.weighted(torch.linspace(-1, 1, num_rows), torch.ones(num_rows))
    groups = rollouts.groups
    # A completion's last token is no input, and a prompt is one of all its completions.
    packed = sum(map(len, groups.prompt_ids)) + int(groups.lengths.sum()) - groups.num_rows
    completion = int(rollouts.groups.mask.sum())
    body, head = sizes(unwrapped(policy_of(loop).model))
    runs = {
        "rollout": (rollout, 2 * (completion * (body + head) + sum(map(len, rollouts.groups.prompt_ids)) * body)),
        "reference": (
            lambda: loop.learner.policy.ref_logprobs(rollouts.groups, max_tokens=budget),
            2 * (packed * body + completion * head),
        ),
        "update": (
            lambda: loop.learner.updater.step(loop.algorithm, rows, on_policy=True, where="the profile"),
            # The head's logits are computed again in the backward pass: 8 instead of 6.
            6 * packed * body + 8 * completion * head,
        ),
    }
    found = {name: one_phase(function, flops) for name, (function, flops) in runs.items()}
    paper = on_paper(loop, prompts, completion / num_rows, limits, precision)
    for name, phase in found.items():
        phase["on_paper"] = paper[name]
    seconds, tokens = plain_generate(loop, prompts)
    return found | {
        "tokens": {"packed": packed, "completion": completion},
        "tokens_per_second": {"dar": completion / found["rollout"]["seconds"], "generate": tokens / seconds},
    }


def policy_of(loop: Loop) -> Policy:
    """Its policy, which is one of text."""
    policy = loop.learner.policy
    assert isinstance(policy, Policy)
    return policy


def plain_generate(loop: Loop, prompts: Any) -> tuple[float, int]:
    """(median seconds, sampled tokens) of transformers' `generate` on the same prompts, K rows of each."""
    spec, policy = loop.spec, policy_of(loop)
    reversed_ids, reversed_mask = pad_rows([prompt.token_ids[::-1] for prompt in prompts], pad_id=0)
    ids = reversed_ids.flip(1).repeat_interleave(spec.num_generations, 0)
    mask = reversed_mask.flip(1).long().repeat_interleave(spec.num_generations, 0)
    eos = list(policy.eos_token_ids)
    seconds, tokens = [], 0
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad(), policy.precision.compute():
            output = unwrapped(policy.model).generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=spec.sampling.max_completion_length,
                eos_token_id=eos,
                pad_token_id=eos[0],
            )
        seconds.append(time.perf_counter() - started)
        new = output[:, ids.shape[1] :]
        ended = torch.isin(new, torch.tensor(eos)).long()
        tokens = int(((ended.cumsum(1) - ended) == 0).sum())
    return sorted(seconds)[1], tokens


def sizes(model: Any) -> tuple[int, int]:
    """(weights of the linear layers outside the head, weights of the head)."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sum(layer.weight.numel() for layer in linear), head.weight.numel()


def one_phase(function: Any, flops: float) -> dict[str, Any]:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    averages = recorded.key_averages()
    operators = {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in averages}
    kinds: dict[str, float] = {}
    for name, (self_seconds, _) in operators.items():
        kind = kind_of(name)
        kinds[kind] = kinds.get(kind, 0.0) + self_seconds
    largest = sorted(operators.items(), key=lambda item: -item[1][0])[:15]
    median = sorted(seconds)[1]
    return {
        "seconds": median,
        "gflops": flops / median / 1e9,
        "operators": sum(count for _, count in operators.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "largest": [{"name": name, "seconds": spent, "calls": calls} for name, (spent, calls) in largest],
    }


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::")
    for kind, patterns in KINDS.items():
        if any(pattern in name for pattern in patterns):
            return kind
    return "other"


def show(result: dict[str, Any]) -> None:
    console = Console(width=120)
    rates = result["phases"]["tokens_per_second"]
    console.print(
        f"sampling {rates['dar']:.0f} tokens/s, transformers' generate {rates['generate']:.0f}: "
        f"{rates['dar'] / rates['generate']:.1f} ×"
    )
    limit = result["limits_after"][f"gemm_{result['precision']}_gflops"]
    for phase in ("rollout", "reference", "update"):
        found = result["phases"][phase]
        total = sum(found["kinds"].values())
        table = Table(
            title=f"{phase}: {found['seconds']:.2f} s, {found['gflops']:.0f} GFLOP/s of useful products = "
            f"{found['gflops'] / limit:.0%} of the GEMM limit ({limit:.0f}); on paper {found['on_paper']:.2f} s",
            title_justify="left",
        )
        table.add_column("operators")
        table.add_column("share", justify="right")
        for kind, seconds in found["kinds"].items():
            table.add_row(kind, f"{seconds / total:.0%}")
        console.print(table)
        for row in found["largest"][:10]:
            console.print(f"  {row['seconds']:7.3f} s  {row['calls']:6d} ×  {row['name']}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("chat", "tldr"), required=True)
    parser.add_argument("--prompts", type=Path, help="tldr: a JSONL file (may be gzipped) with a prompt column")
    parser.add_argument("--algorithm", choices=("dar", "grpo"), default="grpo")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--compile-layers", action="store_true", help="runtime.compile_layers")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    if args.workload == "tldr" and args.prompts is None:
        parser.error("--workload tldr needs --prompts FILE")
    return args


if __name__ == "__main__":
    main()
