"""What one step of a recipe will do, before any weight is loaded: rows, tokens, passes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dar.assembly.algorithm import build_algorithm, build_before, reads_reference
from dar.assembly.data import build_data
from dar.assembly.device import build_precision
from dar.assembly.engine import build_engine, require_submit
from dar.assembly.memory import ModelShape, StepShape, memory_of, shape_of
from dar.assembly.objects import NOTHING
from dar.assembly.retention import build_retention
from dar.assembly.reward import check_reward
from dar.assembly.scaling import Estimate, estimate, update_bytes
from dar.assembly.text import TextParts
from dar.config.actor_critic import ActorCriticSpec
from dar.config.cluster import ClusterSpec
from dar.config.engine import InProcessSpec
from dar.config.flow import FlowModelSpec
from dar.config.hardware import HardwareSpec
from dar.config.model import ModelSourceSpec, ModelSpec
from dar.config.optim import AdamW8BitSpec, AdamWSpec
from dar.config.realignment import TRACESpec
from dar.config.rewards import reward_name
from dar.config.run import RunSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.text.loading import followed, load_config

LIBRARIES_GB = 0.75  # of Python, torch, transformers and what else a run imports
ROW_BYTES, TEXT_BYTES = 13, 4  # of a sampled token (id 8, mask 1, log-probability 4), and of its text, roughly


@dataclass(frozen=True)
class Plan:
    """Counts are exact. memory_gb: most at once, in 10⁹ bytes, in each phase of a step whose completions are all as
    long as they may be; of which `weights`; and `libraries`, resident in the process before. cluster: who takes part;
    moved_mb: what they send each other in a step, in 10⁶ bytes. on_paper: the step on hardware that need not exist.
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
    cluster: tuple[str, ...] = ()
    moved_mb: dict[str, float] = field(default_factory=dict)
    on_paper: Estimate | None = None

    @property
    def peak_gb(self) -> float:
        """Of the process, or of an accelerator's own memory."""
        phases = max(size for name, size in self.memory_gb.items() if name != "libraries")
        return phases + self.memory_gb["libraries"] * (self.device == "cpu")


def make_plan(spec: RunSpec, hardware: HardwareSpec | None = None) -> Plan:
    """Reads data and the model's configuration, and counts; no cluster is asked for anything.

    Raises:
        DarError: the recipe cannot run; the same checks a run makes before loading weights.
    """
    precision = build_precision(spec)
    if isinstance(spec.model, FlowModelSpec):
        raise ConfigError("dar plan counts tokens, which a flow-matching model has not: try dar train RECIPE steps=1")
    parts = TextParts(spec, spec.model, NOTHING)
    data = build_data(spec, NOTHING, parts)
    before = build_before(spec)
    engine = build_engine(spec.engine)
    if spec.cluster is None:
        require_submit(spec, engine)
    engine.close()
    for reward in (*spec.rewards, *spec.evaluation.rewards):
        check_reward(reward, spec.runtime)
    build_retention(spec, parts.tokenizer)
    algorithm = build_algorithm(spec.algorithm, max_completion_length=spec.sampling.max_completion_length)
    with_reference = reads_reference(spec, algorithm, has_heldout=data.heldout is not None)
    parts.require(algorithm)
    shape = shape_of(parts.config)
    lengths = [len(prompt.token_ids) for prompt in data.train.prompts]
    num_generations = spec.num_generations if data.logged is None else len(data.logged.groups[0].completions)
    rows = spec.prompts_per_step * num_generations
    longest = max(lengths) + spec.sampling.max_completion_length
    passes = [f"{'sample' if data.logged is None else 'read'} {rows} completions"]
    passes += ["score them"] if data.logged is None and spec.rewards else []
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
    batch = (lengths, num_generations, with_reference)
    memory = memory_of(shape, step_shape(spec, parts.config, shape, precision, *batch))
    has = {"rollout": data.logged is None, "reference": with_reference}
    cluster, moved, on_paper = (), {}, None
    if spec.cluster is not None:
        shares = (spec.cluster.learners, spec.cluster.samplers)
        learner, sampler = (step_shape(spec, parts.config, shape, precision, *batch, num_ranks=n) for n in shares)
        cluster, moved = _on_cluster(spec, spec.cluster, shape, learner, sampler, rows)
    if hardware is not None:
        path = hardware.model and hardware.model.removesuffix("config.json")
        config = load_config(ModelSourceSpec(path=path)) if path else parts.config
        ranks, model = hardware.learners or hardware.num_sampling, shape_of(config)
        own = step_shape(spec, config, model, Precision(torch.device("cpu"), torch.bfloat16), *batch, num_ranks=ranks)
        reads = algorithm.needs_reference + algorithm.needs_values + algorithm.needs_ratios * (algorithm.updates - 1)
        on_paper = estimate(model, own, spec, hardware, prompt_length=sum(lengths) / len(lengths), reads=reads,
                            generations=num_generations, updates=algorithm.updates + algorithm.replay)  # fmt: skip
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
        cluster=cluster,
        moved_mb=moved,
        on_paper=on_paper,
    )


def _on_cluster(
    spec: RunSpec, cluster: ClusterSpec, model: ModelShape, step: StepShape, sampler: StepShape, rows: int
) -> tuple[tuple[str, ...], dict[str, float]]:
    """(who has so many bundles, a CPU each and but for rewards a GPU; 10⁶ bytes of a step)."""
    ranks, prompts = cluster.learners, spec.prompts_per_step
    step = replace(step, shards=ranks if spec.runtime.sharding == "full" else 1)
    learns = max(size for name, size in memory_of(model, step).items() if name != "rollout") / 1e9 + LIBRARIES_GB
    samples = memory_of(model, replace(sampler, moments=0, reference=0))["rollout"] / 1e9 + LIBRARIES_GB
    engine = spec.engine.type + (f", {samples:.3g} GB" if isinstance(spec.engine, InProcessSpec) else "")
    tokens = rows * spec.sampling.max_completion_length
    moved = {
        "weights, into the object store and to each sampler": 4 * (step.trained - (step.trunks - 1) * model.total),
        "completions, from all samplers": (ROW_BYTES + TEXT_BYTES) * tokens,
        "texts, to reward workers": TEXT_BYTES * tokens,
        "rewards, back": 8 * rows * len(spec.rewards),
        "weights and gradients, by each learner": update_bytes(model, step, ranks),
    }
    return (
        f"{ranks} × learner: at most {-(-prompts // ranks)} prompts a step, {learns:.3g} GB",
        f"{cluster.samplers} × sampler: about {-(-prompts // cluster.samplers)} prompts a step, engine {engine}",
        f"{cluster.reward_workers} × reward worker: {', '.join(map(reward_name, spec.rewards)) or 'nothing to score'}",
    ), {name: size / 1e6 for name, size in moved.items()}


def step_shape(
    spec: RunSpec, config: Any, model: ModelShape, precision: Precision, prompts: Sequence[int], num_generations: int,
    with_reference: bool = True, *, num_ranks: int = 1
) -> StepShape:  # fmt: skip
    """What takes memory in a step of a rank, its completions all as long as they may be, its prompts of mean length."""
    own = -(-spec.prompts_per_step // num_ranks)
    length, longest = spec.sampling.max_completion_length, max(prompts)
    rows = num_generations * length
    group = round(sum(prompts) / len(prompts)) + rows
    per = min(max(1, spec.runtime.max_tokens_per_microbatch // group), own)
    count = -(-own // per)
    engine = spec.engine if isinstance(spec.engine, InProcessSpec) else None
    cached = min(max(1, engine.max_cache_tokens // (longest + rows)), own) if engine else 0
    compute, rank = precision.dtype.itemsize, spec.model.lora.first_rank if spec.model.lora else 0
    held = config if spec.other_reference is None else load_config(spec.other_reference)
    halves = (torch.bfloat16, torch.float16)
    saved, kept = (2 if getattr(each, "dtype", None) in halves else 4 for each in (config, held))
    base = saved if rank and not followed(spec.model)[1] else 4
    is_in_place = engine is None or engine.in_place or (precision.device.type != "cpu" and base == compute)
    has_own = with_reference and not (rank and held is config)
    critic = isinstance(spec.algorithm, ActorCriticSpec) and spec.algorithm.critic == "model"
    return StepShape(
        tokens=max(per * group, longest + rows),
        last=(own - (count - 1) * per) * group,
        microbatches=count,
        rows=cached * num_generations,
        length=length,
        prompts=cached * longest,
        trained=(rank * model.features if rank else model.total) + (model.total if critic else 0),
        rank=rank,
        base_bytes=base,
        moments=2 if isinstance(spec.optim, AdamW8BitSpec) else 8 if isinstance(spec.optim, AdamWSpec) else 0,
        compute=compute,
        reference=min(kept, compute) * (model if held is config else shape_of(held)).total if has_own else 0,
        trunks=2 if critic else 1,
        is_checkpointed=isinstance(spec.model, ModelSpec) and spec.model.gradient_checkpointing,
        is_in_place=is_in_place,
    )
