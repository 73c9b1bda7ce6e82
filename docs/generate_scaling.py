"""Writes the tables of docs/scaling.md: steps on paper, by the formulas of `dar plan --cluster-spec`.

    python docs/generate_scaling.py            # write them
    python docs/generate_scaling.py --check    # exit 1 where they are not what the formulas say

Prose stands in the page itself, around the marks `<!-- generated: … -->` and `<!-- to here -->`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from generate_recipes import section, write_or_check
from transformers import AutoConfig

from dar.assembly.memory import ModelShape, shape_of
from dar.assembly.plan import step_shape
from dar.assembly.scaling import Estimate, estimate
from dar.config.hardware import HardwareSpec
from dar.config.recipe import build_spec
from dar.errors import ConfigError
from dar.policies.precision import Precision

TARGET = Path(__file__).with_name("scaling.md")

MODELS: dict[str, dict[str, Any]] = {
    "7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
GPUS: dict[str, dict[str, Any]] = {
    "H100": {"memory_gb": 80, "memory_gb_per_s": 3350},
    "H200": {"memory_gb": 141, "memory_gb_per_s": 4800},
}
COMMON: dict[str, Any] = {"devices": 8, "bf16_tflops": 989, "link_gb_per_s": 450, "network_gb_per_s": 50}
PROMPT, COMPLETION, GENERATIONS, PROMPTS = 512, 1024, 8, 512
RECIPE: dict[str, Any] = {
    "model": {"path": "toy:letters", "gradient_checkpointing": True},
    "data": "-",
    "rewards": ["sentiment"],
    "steps": 1,
    "output_dir": "-",
    "prompts_per_step": PROMPTS,
    "num_generations": GENERATIONS,
    "sampling": {"max_completion_length": COMPLETION},
    "runtime": {"sharding": "full", "max_tokens_per_microbatch": 32768},
}


def shapes() -> dict[str, tuple[Any, ModelShape]]:
    """Configuration and shape of each model; no weight is made."""
    configs = {
        name: AutoConfig.for_model(**keys, dtype=torch.bfloat16, tie_word_embeddings=False)
        for name, keys in MODELS.items()
    }
    return {name: (config, shape_of(config)) for name, config in configs.items()}


def step(config: Any, shape: ModelShape, gpu: str, num: int, *, is_split: bool, rank: int | None) -> Estimate:
    """DAR's step of one model on so many devices."""
    is_large = shape.total > 2e10
    model = RECIPE["model"] | ({"lora": {"rank": rank}} if rank else {})
    sampling = RECIPE["sampling"] | {"max_staleness": int(is_split)}
    runtime = RECIPE["runtime"] | {"max_tokens_per_microbatch": 8192 if is_large else 32768}
    parts = {"model": model, "sampling": sampling, "runtime": runtime, "cluster": "auto"}
    spec = build_spec(RECIPE | parts, where="the page")
    hardware = HardwareSpec(
        **COMMON,
        **GPUS[gpu],
        nodes=num // 8,
        learners=num // 2 if is_split else None,
        devices_per_sampler=1 if not is_large else 4 if is_split else 8,
    )
    own = step_shape(spec, config, shape, Precision(torch.device("cpu"), torch.bfloat16), [PROMPT], GENERATIONS,
                     num_ranks=hardware.learners or num)  # fmt: skip
    return estimate(shape, own, spec, hardware, prompt_length=PROMPT, generations=GENERATIONS, reads=1, updates=1)


COLUMNS = (
    "model", "GPUs", "who samples", "GB to learn", "GB to sample", "completions at once", "rollout, s", "weights, s",
    "reference, s", "update, s", "step, s", "tokens/s", "GB sent", "the longest phase",
)  # fmt: skip


def table(gpu: str) -> str:
    """A row for each model, number of GPUs of that kind, and division of them."""
    rows = [COLUMNS, ("---",) + ("---:",) + ("---",) + ("---:",) * 10 + ("---",)]
    for name, (config, shape) in shapes().items():
        for method, rank in ((name, None), *([(f"{name}, LoRA", 16)] if name == "70B" else [])):
            for num in (8, 64, 512):
                for is_split in (False, True):
                    who = "half, a step ahead" if is_split else "all, in turns"
                    rows.append((method, str(num), who, *cells(config, shape, gpu, num, is_split=is_split, rank=rank)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(*case: Any, **how: Any) -> tuple[str, ...]:
    """What a row says of a step, or why there is none."""
    try:
        found = step(*case, **how)
    except ConfigError as error:
        return ("no room to sample" if "no completion" in str(error) else "too much", *[""] * 10)
    seconds = [found.phases[name].seconds for name in ("rollout", "weights", "reference", "update")]
    learns, samples = max(found.memory_gb[found.sharding].values()), sum(found.sampler_gb.values())
    return (
        f"{learns:.0f}", f"{samples:.0f}", f"{found.rows_at_once:,}", *map(shown, seconds), shown(found.seconds),
        f"{found.sampled_per_second:,.0f}", f"{max(phase.sent_gb for phase in found.phases.values()):,.0f}",
        found.bottleneck.replace(" of the seconds", ""),
    )  # fmt: skip


def shown(seconds: float) -> str:
    """Two or three figures."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}"


def render() -> str:
    """The page, with each part between its marks made anew."""
    page = TARGET.read_text(encoding="utf-8")
    parts = {gpu: f"{table(gpu)}\n" for gpu in GPUS} | {"keys": section(HardwareSpec, [], level=2)}
    for name, part in parts.items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- to here -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n" + part + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    write_or_check(TARGET, render, Path(__file__).name)
