"""One measured run of vLLM offline (its `LLM` class, its own random numbers), in its environment: job (JSON) on
standard input, result as last line."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    # collective_rpc below passes a function.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    begun = time.perf_counter()
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - reads the variables above

    model = LLM(
        job["model"],
        dtype={"fp32": "float32", "bf16": "bfloat16"}[job["precision"]],
        max_model_len=1024,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        logprobs_mode="processed_logprobs",
        kv_cache_memory_bytes=2**30,
        enforce_eager=job["eager"],
        disable_log_stats=True,
    )
    start = time.perf_counter() - begun
    params = SamplingParams(n=job["num_generations"], temperature=1.0, max_tokens=job["max_new_tokens"], logprobs=0)
    seconds, tokens = [], []
    for _ in range(job["repeats"]):
        begun = time.perf_counter()
        found = model.generate(job["prompts"], params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
        tokens.append(sum(len(each.token_ids) for group in found for each in group.outputs))
    begun = time.perf_counter()
    model.collective_rpc("reload_weights")
    model.reset_prefix_cache()
    update = time.perf_counter() - begun
    print("\n" + json.dumps({"start": start, "seconds": seconds, "tokens": tokens, "update": update}))


if __name__ == "__main__":
    main()
