"""What one step of a recipe will do, before any weight is loaded: rows, tokens, passes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dar.assembly.algorithm import build_algorithm, build_before, reads_reference
from dar.assembly.data import build_data
from dar.assembly.device import build_precision
from dar.assembly.memory import ModelShape, StepShape, memory_of, shape_of
from dar.assembly.objects import NOTHING
from dar.assembly.reward import check_reward
from dar.assembly.text import TextParts
from dar.config.actor_critic import ActorCriticSpec
from dar.config.engine import InProcessSpec
from dar.config.flow import FlowModelSpec
from dar.config.optim import AdamW8BitSpec, AdamWSpec
from dar.config.realignment import TRACESpec
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.loading import followed

LIBRARIES_GB = 0.75  # of Python, torch, transformers and what else a run imports


@dataclass(frozen=True)
class Plan:
    """Counts are exact. memory_gb: most at once, in 10⁹ bytes, in each phase of a step whose completions are all as
    long as they may be; of which `weights`; and `libraries`, resident in the process before.
    """

    num_parameters: int
    num_train_prompts: int
    num_heldout_prompts: int
    num_dropped: int
    mean_prompt_length: float
    longest_prompt: int
    rows_per_step: int
    max_completion_tokens_per_step: int
    max_padded_tokens_per_step: int
    epochs: float
    passes: tuple[str, ...]
    memory_gb: dict[str, float]
    device: str
    compute_dtype: str

    @property
    def peak_gb(self) -> float:
        """Of the process, or of an accelerator's own memory."""
        phases = max(size for name, size in self.memory_gb.items() if name != "libraries")
        return phases + self.memory_gb["libraries"] * (self.device == "cpu")


def make_plan(spec: RunSpec) -> Plan:
    """Reads data and the model's configuration, and counts.

    Raises:
        DarError: the recipe cannot run; the same checks a run makes before loading weights.
    """
    precision = build_precision(spec)
    if isinstance(spec.model, FlowModelSpec):
        raise ConfigError("dar plan counts tokens, which a flow-matching model has not: try dar train RECIPE steps=1")
    parts = TextParts(spec, spec.model, NOTHING)
    data = build_data(spec, NOTHING, parts)
    before = build_before(spec)
    parts.engine().close()
    for reward in (*spec.rewards, *spec.evaluation.rewards):
        check_reward(reward, spec.runtime)
    algorithm = build_algorithm(spec.algorithm, max_completion_length=spec.sampling.max_completion_length)
    with_reference = reads_reference(spec, algorithm, has_heldout=data.heldout is not None)
    parts.require(algorithm)
    shape = shape_of(parts.config)
    lengths = [len(prompt.token_ids) for prompt in data.train.prompts]
    num_generations = spec.num_generations if data.logged is None else len(data.logged.groups[0].completions)
    rows = spec.prompts_per_step * num_generations
    longest = max(lengths) + spec.sampling.max_completion_length
    passes = [f"sample {rows} completions", "score them"] if data.logged is None else [f"read {rows} completions"]
    if algorithm.needs_reference:
        passes.append("forward pass of the reference")
    if algorithm.needs_values:
        passes.append("forward pass of the critic")
    passes.append(f"{algorithm.updates} × forward and backward pass of the policy")
    if isinstance(spec.algorithm, TRACESpec) and spec.algorithm.kl_coef:
        passes.append("forward pass of the reference beside it, where pairs are retained")
    if algorithm.needs_ratios and algorithm.updates > 1:
        passes.append(f"{algorithm.updates - 1} × forward pass of the policy to set its bounds")
    if algorithm.replay:
        passes.append(f"{algorithm.replay} × forward and backward pass on earlier batches")
    step = _step_shape(parts, shape, precision, lengths, num_generations)
    memory = memory_of(shape, step if with_reference else replace(step, reference=0))
    has = {"rollout": data.logged is None, "reference": with_reference}
    return Plan(
        num_parameters=shape.total,
        num_train_prompts=len(data.train),
        num_heldout_prompts=len(data.known.groups) if data.known else len(data.heldout or ()),
        num_dropped=data.train.num_dropped,
        mean_prompt_length=sum(lengths) / len(lengths),
        longest_prompt=max(lengths),
        rows_per_step=rows,
        max_completion_tokens_per_step=rows * spec.sampling.max_completion_length,
        max_padded_tokens_per_step=rows * longest,
        epochs=spec.steps * spec.prompts_per_step / len(data.train),
        passes=(*before.passes(data), *passes),
        memory_gb={"libraries": LIBRARIES_GB} | {name: n / 1e9 for name, n in memory.items() if has.get(name, True)},
        device=str(precision.device),
        compute_dtype=str(precision.dtype).removeprefix("torch."),
    )


def _step_shape(
    parts: TextParts, model: ModelShape, precision: Precision, prompts: Sequence[int], num_generations: int
) -> StepShape:
    """What takes memory in a step, its completions all as long as they may be, its prompts of mean length."""
    spec = parts.spec
    length, longest = spec.sampling.max_completion_length, max(prompts)
    rows = num_generations * length
    group = round(sum(prompts) / len(prompts)) + rows
    per = min(max(1, spec.runtime.max_tokens_per_microbatch // group), spec.prompts_per_step)
    count = -(-spec.prompts_per_step // per)
    engine = spec.engine if isinstance(spec.engine, InProcessSpec) else None
    cached = min(max(1, engine.max_cache_tokens // (longest + rows)), spec.prompts_per_step) if engine else 0
    compute, rank = precision.dtype.itemsize, spec.model.lora.first_rank if spec.model.lora else 0
    saved = 2 if getattr(parts.config, "dtype", None) in (torch.bfloat16, torch.float16) else 4
    base = saved if rank and not followed(parts.source)[1] else 4
    is_in_place = engine is None or engine.in_place or (precision.device.type != "cpu" and base == compute)
    critic = isinstance(spec.algorithm, ActorCriticSpec) and spec.algorithm.critic == "model"
    return StepShape(
        tokens=max(per * group, longest + rows),
        last=(spec.prompts_per_step - (count - 1) * per) * group,
        microbatches=count,
        rows=cached * num_generations,
        length=length,
        prompts=cached * longest,
        trained=(rank * model.features if rank else model.total) + (model.total if critic else 0),
        rank=rank,
        base_bytes=base,
        moments=2 if isinstance(spec.optim, AdamW8BitSpec) else 8 if isinstance(spec.optim, AdamWSpec) else 0,
        compute=compute,
        reference=0 if rank else min(saved, compute) * model.total,
        trunks=2 if critic else 1,
        is_checkpointed=parts.source.gradient_checkpointing,
        is_in_place=is_in_place,
    )
