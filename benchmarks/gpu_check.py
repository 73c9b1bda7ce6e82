"""Is the library right on this device, and how fast is it there? One run of at most `--minutes`, without any download.

    python benchmarks/gpu_check.py --json gpu.json
    python benchmarks/gpu_check.py --device cpu --size tiny --json tiny.json

First parity, on a small model with random weights: what the sampler, the packed and the padded pass say of the same
completions, their gradients, and draws against the CPU's. Then sampling against transformers' `generate` and the packed
update against the padded one, on random weights of Qwen2.5's shapes, beside the device's limits measured now. A part
that fails is reported, and the others still run; the exit code is then 1. What the time did not suffice for is named.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import machine_facts, machine_limits
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dar.batch import Prompt, TokenGroups
from dar.config.model import LoraSpec
from dar.config.optim import AdamWSpec
from dar.learn.optim import build_optimizer
from dar.policies.precision import Precision
from dar.policies.text.loading import add_lora
from dar.policies.text.logprobs import LogprobModel, unwrapped
from dar.policies.text.policy import Policy
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey, draw

QWEN: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300},
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 5000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}  # fmt: skip
"""Shapes. `small` is what parity is proved on, on a GPU."""

WITH_ADAPTER = ("7B",)
"""Trained with LoRA: weights, gradients and moments in fp32 would be 112 GB."""


@dataclass(frozen=True)
class Workload:
    """prompts × completions; their lengths; tokens of a micro-batch."""

    prompts: int
    completions: int
    prompt_length: int
    length: int
    microbatch: int


WORK = {"cpu": Workload(2, 2, 12, 8, 64), "gpu": Workload(16, 8, 512, 256, 16_384)}


@dataclass
class Report:
    """What has been found so far, and how much time is left."""

    minutes: float
    console: Console
    started: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=lambda: {"parity": [], "sizes": [], "failed": {}, "skipped": []})

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, what: str) -> None:
        self.console.print(f"[{self.elapsed:6.1f} s] {what}", markup=False, highlight=False)

    def part(self, name: str, run: Callable[[], None], *, needs: float = 0.0) -> None:
        """Runs it unless `needs` seconds more than there are would be needed; an error ends the part alone."""
        if self.elapsed + needs > 60 * self.minutes:
            self.found["skipped"].append(name)
            self.say(f"{name}: skipped, {self.minutes:g} minutes do not suffice")
            return
        self.say(f"{name} …")
        try:
            run()
        except Exception as error:  # whatever a device raises, the other parts have something to say
            self.found["failed"][name] = f"{type(error).__name__}: {error}"
            self.say(traceback.format_exc())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def parity(self, name: str, value: float, limit: float) -> None:
        # Written so that NaN fails too.
        holds = value <= limit
        self.found["parity"].append({"check": name, "value": value, "limit": limit, "holds": holds})
        if not holds:
            self.found["failed"][name] = f"{value:.3g} > {limit:g}"


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    report = Report(args.minutes, Console(width=118))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --device cpu --size tiny shows that the script runs")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    report.found |= {"device": name, "facts": machine_facts()}
    report.say(f"{name}, torch {torch.__version__}")
    report.part("limits", lambda: report.found.update(limits=limits(device)))
    for window in None, 8:
        for dtype in torch.float32, torch.bfloat16:
            label = f"parity, {str(dtype)[6:]}" + (f", window of {window}" if window else "")
            report.part(label, lambda d=dtype, w=window, n=label: check_parity(report, device, d, w, n))
    report.part("draws", lambda: check_draws(report, device))
    # Every size is some times the one before; by its time it is known whether there is enough of it left.
    last = 0.0
    for size in args.size:
        began = report.elapsed
        report.part(size, lambda s=size: report.found["sizes"].append(measure(report, device, s)), needs=2 * last)
        last = report.elapsed - began
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report.found, indent=1) + "\n")
    sys.exit(1 if report.found["failed"] else 0)


def limits(device: torch.device) -> dict[str, float]:
    if device.type == "cpu":
        return machine_limits()
    return machine_limits(device, rows=8192, inputs=4096, outputs=4096, copied=256 * 1024 * 1024)


# --- parity ----------------------------------------------------------------------------------------------------------


def check_parity(report: Report, device: torch.device, dtype: torch.dtype, window: int | None, name: str) -> None:
    """Sampler, packed and padded pass on the same completions, and the gradients of the last two."""
    size = "tiny" if device.type == "cpu" else "small"
    changes: dict[str, Any] = {"initializer_range": 0.1}
    if window is not None:
        changes |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    policy = make_policy(size, device, dtype, **changes)
    generator = torch.Generator().manual_seed(0)
    prompts = make_prompts([int(n) for n in torch.randint(3, 40, (6,), generator=generator)])
    policy.eos_token_ids = list(range(0, policy.model.config.vocab_size, 20))
    groups, sampler = sampled(policy, prompts, 4, 24)
    packed = policy.logprobs(groups, max_tokens=10_000)
    padded_model = LogprobModel(policy.model, temperature=1.0, packed=False)
    if not policy.module.is_packed:
        raise RuntimeError("the packed pass was refused")
    gradients = []
    for module in policy.module, padded_model:
        module.zero_grad()
        with policy.precision.compute():
            logprobs = module(groups).logprobs
        logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double())
    padded = logprobs.detach().cpu()
    mask, is_exact = groups.mask, dtype == torch.float32
    noise = policy.precision.logprob_noise
    for pair, one, other in ("sampler, packed", sampler, packed), ("packed, padded", packed, padded):
        gap = (one - other)[mask].abs()
        report.parity(f"{name}: {pair}, nats", float(gap.max() if is_exact else gap.mean()), noise)
    one, other = gradients
    report.parity(f"{name}: gradients, relative", float((one - other).norm() / other.norm()), 1e-3 if is_exact else 0.1)


def check_draws(report: Report, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(512, 5000, generator=generator).mul(3).softmax(-1)
    seeds = torch.randint(-(2**62), 2**62, (512,), generator=generator)
    changed = draw(probabilities, seeds) != draw(probabilities.to(device), seeds.to(device)).cpu()
    report.parity("draws: tokens that are not the CPU's, of 512", float(changed.sum()), 0)


# --- speed and memory ------------------------------------------------------------------------------------------------


def measure(report: Report, device: torch.device, size: str) -> dict[str, Any]:
    """One size's row of the table."""
    work = WORK["cpu" if device.type == "cpu" else "gpu"]
    policy = make_policy(size, device, torch.bfloat16, with_adapter=size in WITH_ADAPTER)
    prompts = make_prompts([work.prompt_length] * work.prompts)
    policy.eos_token_ids = [policy.model.config.vocab_size]  # which is never drawn: all rows have the same length
    num_parameters = sum(p.numel() for p in unwrapped(policy.model).parameters())
    row: dict[str, Any] = {"size": size, "parameters": num_parameters, "trained": "LoRA" if policy.is_lora else "all"}
    report.say(f"{size}: {num_parameters / 1e9:.2f} billion parameters")
    num_tokens = work.prompts * work.completions * work.length

    sampled(policy, prompts, work.completions, 4)
    with timed(device) as took:
        groups, _ = sampled(policy, prompts, work.completions, work.length)
    row |= {"sampled": num_tokens / took["seconds"], "sampling_gb": took["gb"]}
    row["generated"] = num_tokens / generate_seconds(policy, prompts, work)
    report.say(f"{size}: {row['sampled']:,.0f} tokens/s sampled, {row['generated']:,.0f} by generate")

    optimizer = build_optimizer(AdamWSpec(learning_rate=1e-6), policy.trainable().values())
    parts = [groups.select(rows) for rows in groups.split(work.microbatch)]
    policy.module.train()
    row |= update(policy, policy.module, parts, optimizer, "packed")
    report.say(f"{size}: packed update {row['packed_s']:.2f} s, {row['packed_gb']:.1f} GB")
    # Forward and backward pass, without what attention adds: 6 a parameter and token, 4 where the base stays as it is.
    tokens = work.prompts * (work.prompt_length + work.completions * (work.length - 1))
    row["tflops"] = (4 if policy.is_lora else 6) * num_parameters * tokens / row["packed_s"] / 1e12
    padded = LogprobModel(policy.model, temperature=1.0, packed=False).train()
    at_once = max(1, work.microbatch // (work.completions * (work.prompt_length + work.length)))
    parts = [groups.select(groups.rows_of(n, n + at_once)) for n in range(0, work.prompts, at_once)]
    row |= update(policy, padded, parts, optimizer, "padded")
    report.say(f"{size}: padded update {row['padded_s']:.2f} s, {row['padded_gb']:.1f} GB")
    return row


def update(
    policy: Policy, module: LogprobModel, parts: Sequence[TokenGroups], optimizer: torch.optim.Optimizer, name: str
) -> dict[str, float]:
    """Seconds and peak GB of forward and backward passes and the optimizer's step; a step before it warms up."""

    def step() -> None:
        for part in parts:
            with policy.precision.compute():
                loss = -module(part).logprobs.mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with timed(policy.precision.device) as took:
        step()
    return {f"{name}_s": took["seconds"], f"{name}_gb": took["gb"]}


def generate_seconds(policy: Policy, prompts: Sequence[Prompt], work: Workload) -> float:
    """transformers' own sampling of as many tokens, from a copy of the model in the compute precision."""
    device, model = policy.module.device, policy.model
    plain = (copy.deepcopy(model).merge_and_unload() if policy.is_lora else copy.deepcopy(model)).bfloat16()
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt.token_ids for prompt in prompts], device=device).repeat_interleave(work.completions, 0)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        plain.generate(ids, max_new_tokens=4, attention_mask=torch.ones_like(ids), **options)
        with timed(device) as took:
            plain.generate(ids, max_new_tokens=work.length, attention_mask=torch.ones_like(ids), **options)
    return took["seconds"]


@contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of what is inside, until the device has done it, and the most memory it held; 0 GB on a CPU."""
    took = {"seconds": 0.0, "gb": 0.0}
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield took
    if is_cuda:
        torch.cuda.synchronize()
        took["gb"] = torch.cuda.max_memory_allocated() / 1e9
    took["seconds"] = time.perf_counter() - started


# --- models and rows -------------------------------------------------------------------------------------------------


def make_policy(
    size: str, device: torch.device, dtype: torch.dtype, *, with_adapter: bool = False, **changes: Any
) -> Policy:
    torch.manual_seed(0)
    config = Qwen2Config(
        **({"tie_word_embeddings": True, "max_position_embeddings": 4096, "eos_token_id": 0} | QWEN[size] | changes)
    )
    with device:
        model: Any = Qwen2ForCausalLM(config).eval()
    if with_adapter:
        model = add_lora(model, LoraSpec(rank=16))
    return Policy(model, byte_tokenizer(), Precision(device, dtype), temperature=1.0, with_reference=False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer: Any = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_prompts(lengths: Sequence[int]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths)
    return [Prompt(number, "", tuple(ids), {}) for number, ids in enumerate(rows)]


def sampled(policy: Policy, prompts: Sequence[Prompt], completions: int, length: int) -> tuple[TokenGroups, Tensor]:
    """Completions and the sampler's log-probabilities of them."""
    engine = InProcessEngine(max_tokens=10**7)
    engine.sync(policy, 0)
    rollouts = engine.generate(prompts, completions, max_completion_length=length, key=SamplingKey(0))
    return rollouts.groups, rollouts.logprobs


def show(report: Report) -> None:
    found = report.found
    checks = Table(title="parity", title_justify="left")
    for heading in "check", "found", "limit", "":
        checks.add_column(heading)
    for check in found["parity"]:
        verdict = "holds" if check["holds"] else "FAILS"
        checks.add_row(check["check"], f"{check['value']:.2g}", f"{check['limit']:g}", verdict)
    report.console.print(checks)
    speed = Table(title=f"{found['device']}, bf16", title_justify="left")
    headings = ("size", "trained", "sampled, tokens/s", "generate", "×", "update, s", "padded", "×", "TFLOP/s", "GB")
    for heading in (*headings, "padded"):
        speed.add_column(heading, justify="left" if heading in ("size", "trained") else "right")
    for row in found["sizes"]:
        ratios = f"{row['sampled'] / row['generated']:.1f}", f"{row['padded_s'] / row['packed_s']:.1f}"
        speed.add_row(
            *(row["size"], row["trained"], f"{row['sampled']:,.0f}", f"{row['generated']:,.0f}", ratios[0]),
            *(f"{row['packed_s']:.2f}", f"{row['padded_s']:.2f}", ratios[1], f"{row['tflops']:.1f}"),
            *(f"{row['packed_gb']:.1f}", f"{row['padded_gb']:.1f}"),
        )
    report.console.print(speed)
    report.console.print(", ".join(f"{name} {value:,.0f}" for name, value in found.get("limits", {}).items()))
    for title, names in ("failed", [f"{k}: {v}" for k, v in found["failed"].items()]), ("skipped", found["skipped"]):
        for name in names:
            report.console.print(f"{title}: {name}", markup=False)
    report.say("done")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", nargs="*", default=["0.5B", "1.5B", "7B"], choices=[*QWEN])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further part begins")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
