"""One measured run of an engine of dar, or of transformers' generate: job (JSON) on standard input, result as last
line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from dar.assembly.device import build_precision
from dar.assembly.objects import NOTHING
from dar.assembly.text import TextParts
from dar.batch import Prompt
from dar.config.model import ModelSpec
from dar.config.recipe import build_spec
from dar.config.run import RunSpec
from dar.rollout.sampling import SamplingKey


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    if job["engine"] == "transformers":
        measure_transformers(job)
    else:
        measure_engine(job)


def measure_engine(job: dict[str, Any]) -> None:
    """Start-up is until the engine has weights and has answered for one token; so is an update of the weights, less
    what answering alone takes."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        spec, parts = recipe(job, folder)
        policy = parts.build(build_precision(spec), with_reference=False)
        prompts = [
            Prompt(index, text, tuple(parts.tokenizer(text)["input_ids"]), {})
            for index, text in enumerate(job["prompts"])
        ]
        engine = parts.engine(lambda _: None)
        try:

            def ask(prompts: list[Prompt], count: int, length: int, step: int) -> int:
                key = SamplingKey(0, "train", step)
                rollouts = engine.generate(prompts, count, max_completion_length=length, key=key)
                return int(rollouts.groups.lengths.sum())

            def take(version: int) -> None:
                engine.sync(policy, version)
                ask(prompts[:1], 1, 1, 0)

            take(0)
            start = time.perf_counter() - begun
            seconds, tokens = repeated(
                job, lambda step: ask(prompts, job["num_generations"], job["max_new_tokens"], step)
            )
            begun = time.perf_counter()
            take(1)
            update = time.perf_counter() - begun
            begun = time.perf_counter()
            ask(prompts[:1], 1, 1, 0)
            update -= time.perf_counter() - begun
        finally:
            engine.close()
    report(start, seconds, tokens, update)


def recipe(job: dict[str, Any], folder: str) -> tuple[RunSpec, TextParts]:
    engine: dict[str, Any] = {"type": "in_process"}
    if job["engine"] == "vllm_server":
        eager = ["--enforce-eager"] if job["eager"] else []
        engine = {"type": "vllm", "python": job["vllm_python"], "arguments": eager}
    spec = build_spec(
        {
            "model": job["model"],
            "data": "package:dar/prompts/toy.jsonl",
            "rewards": [{"type": "length", "target": 1}],
            "steps": 1,
            "output_dir": folder,
            "engine": engine,
            "sampling": {"max_completion_length": job["max_new_tokens"]},
            "runtime": {"precision": job["precision"]},
        },
        where="recipe",
    )
    assert isinstance(spec.model, ModelSpec)
    return spec, TextParts(spec, spec.model, NOTHING)


def measure_transformers(job: dict[str, Any]) -> None:
    """`generate`, which has the policy's own weights: nothing is to be updated."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - the other way does not wait for it

    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    inputs = tokenizer(job["prompts"], return_tensors="pt", padding=True)
    start = time.perf_counter() - begun

    def sample(step: int) -> int:
        torch.manual_seed(step)
        found = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=job["num_generations"],
            max_new_tokens=job["max_new_tokens"],
            pad_token_id=tokenizer.pad_token_id,
        )
        written = found[:, inputs["input_ids"].shape[1] :]
        ended = (written == model.generation_config.eos_token_id).int().cumsum(1)
        return int(((ended - (written == model.generation_config.eos_token_id).int()) == 0).sum())

    with torch.inference_mode():
        seconds, tokens = repeated(job, sample)
    report(start, seconds, tokens, 0.0)


def repeated(job: dict[str, Any], sample: Callable[[int], int]) -> tuple[list[float], list[int]]:
    seconds, tokens = [], []
    for step in range(job["repeats"]):
        begun = time.perf_counter()
        tokens.append(sample(step))
        seconds.append(time.perf_counter() - begun)
    return seconds, tokens


def report(start: float, seconds: list[float], tokens: list[int], update: float) -> None:
    print(json.dumps({"start": start, "seconds": seconds, "tokens": tokens, "update": update}))


if __name__ == "__main__":
    main()
