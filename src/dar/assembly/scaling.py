"""What a step takes on a cluster that need not exist: what cannot be left out, at a share of the data sheet's rates.

Latency, stragglers, rewards, and what Python does between two kernels are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dar.assembly.memory import ModelShape, StepShape, cache_bytes, memory_of
from dar.config.hardware import HardwareSpec
from dar.config.run import RunSpec
from dar.errors import ConfigError


def seen_pairs(prompt: float, completion: float, generations: int) -> float:
    """(query, key) pairs of a prompt that is read once and K completions behind it: L(L+1)/2 + K(T·L + T(T+1)/2)."""
    return prompt * (prompt + 1) / 2 + generations * completion * (prompt + (completion + 1) / 2)


def forward_flops(model: ModelShape, tokens: float, predicted: float, pairs: float) -> float:
    """FLOPs of a forward pass: 2 per weight and token (Kaplan et al. 2020, arXiv:2001.08361, §2.1), and attention's 4
    per layer, feature and pair of query and key (the score, the value it weighs). Of the tokens some are `predicted`:
    the head is asked for what comes next."""
    return 2 * (model.linear * tokens + model.head * predicted) + 4 * model.queries * model.layers * pairs


def update_flops(model: ModelShape, step: StepShape, tokens: float, predicted: float, pairs: float) -> float:
    """FLOPs of a forward and backward pass: 6 per weight and token, three times attention's; args as `forward_flops`.

    A frozen weight has no gradient: 4, beside 6 per weight of its adapter. The head's logits are made again in the
    backward pass; with checkpointing layers are, too, up to the last product that it reads."""
    frozen, trained = (model.linear, step.rank * model.features) if step.rank else (0, model.linear)
    unread = 0 if step.rank else model.layers * model.hidden * model.inner
    again = 2 * (frozen + trained - unread) * step.is_checkpointed
    attention = (3 + step.is_checkpointed) * 4 * model.queries * model.layers * pairs
    return (4 * frozen + 6 * trained + again) * tokens + (6 if step.rank else 8) * model.head * predicted + attention


def gather_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring to gather `size` bytes, or to add them up and keep a part: (n − 1)/n · size.
    An all-reduce is both, one after the other (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, §7.1)."""
    return size * (ranks - 1) / ranks


def update_bytes(model: ModelShape, step: StepShape, ranks: int) -> float:
    """Bytes that a rank sends in an update's passes. Replicas add up their gradients once. Sharded weights are gathered
    for every micro-batch, those of layers again for its backward pass, and then its gradient is added up."""
    if step.shards == 1:
        return 2 * gather_bytes(4 * step.trained, ranks)
    frozen = step.base_bytes * (model.total + model.linear) if step.rank else 0
    trained = 3 * 4 * step.trained - (0 if step.rank else 4 * (model.total - model.linear))
    return step.microbatches * gather_bytes(frozen + trained, ranks)


@dataclass(frozen=True)
class Phase:
    """seconds: of a step. bound: what decides them. sent_gb: by the device that sends most."""

    seconds: float
    bound: str
    sent_gb: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """memory_gb: most at once of a device that learns, by `runtime.sharding` and phase. sampler_gb: of one that samples
    so many rows at once. room_gb: that may be used. seconds: of a step."""

    num_parameters: int
    learners: int
    samplers: int
    sharding: str
    room_gb: float
    memory_gb: dict[str, dict[str, float]]
    sampler_gb: dict[str, float]
    rows_at_once: int
    phases: dict[str, Phase]
    seconds: float
    sampled_per_second: float
    bottleneck: str

    def lines(self) -> Iterator[str]:
        """All of it, in words."""
        who = f"{self.learners} learners (sharding {self.sharding}), {self.samplers} samplers"
        yield f"{self.num_parameters:,} parameters, {who}"
        for name, sizes in self.memory_gb.items():
            fits = "does not fit" if max(sizes.values()) > self.room_gb else "fits"
            yield f"sharding {name} {fits} the {self.room_gb:.4g} GB of a device: {said(sizes)}"
        yield f"a sampler has {self.rows_at_once} completions at once, and a device of it GB: {said(self.sampler_gb)}"
        for name, phase in self.phases.items():
            yield f"{name}: {phase.seconds:.3g} s, by {phase.bound}; a device sends {phase.sent_gb:.3g} GB"
        yield f"a step: {self.seconds:.4g} s, {self.sampled_per_second:,.0f} tokens/s; bottleneck {self.bottleneck}"


def estimate(
    model: ModelShape, step: StepShape, spec: RunSpec, hardware: HardwareSpec, *,
    prompt_length: float, generations: int, reads: int, updates: int
) -> Estimate:  # fmt: skip
    """A step of a recipe on that hardware.

    Args:
        model, step: shapes, the step's of a device that learns, with all weights its own.
        spec, hardware: the recipe; what there is, and who has it.
        prompt_length, generations: tokens, on average, and K. reads, updates: passes without gradient, and with.

    Raises:
        ConfigError: someone would be without a prompt, or it fits nowhere.
    """
    prompts, length, per = spec.prompts_per_step, spec.sampling.max_completion_length, hardware.devices_per_sampler
    ranks, samplers = hardware.learners or hardware.num_sampling, hardware.num_sampling // per
    if (most := max(ranks, samplers)) > prompts:
        raise ConfigError(f"each of {most} learners or samplers needs a prompt, but prompts_per_step is {prompts}")
    room, shapes = hardware.memory_gb * hardware.memory_share, {"none": step, "full": replace(step, shards=ranks)}
    memory = {name: {phase: size / 1e9 for phase, size in memory_of(model, each).items() if phase != "rollout"}
              for name, each in shapes.items()}  # fmt: skip
    fitting = [name for name in (spec.runtime.sharding, "full") if max(memory[name].values()) <= room]
    if not fitting:
        raise ConfigError(
            f"{model.total / 1e9:.3g} billion parameters cannot be trained on {ranks} of these devices: each has "
            f"{room:.4g} GB to use, and runtime.sharding=full takes {said(memory['full'])}. Try model.lora, a smaller "
            "runtime.max_tokens_per_microbatch, model.gradient_checkpointing=true, or more learners"
        )
    step = shapes[fitting[0]]
    kept = memory[fitting[0]]["weights"] + step.moments * step.trained / step.shards / 1e9
    sampler = {"weights": step.compute * model.total / per / 1e9, "what is trained": 0 if hardware.learners else kept}
    row = cache_bytes(model, prompt_length + length, step.compute) / per / 1e9
    most = -(-prompts // samplers) * generations
    rows = min(most, int(max(0, room - sum(sampler.values())) / row))
    if not rows:
        raise ConfigError(
            f"no completion fits a sampler: a device has {room:.4g} GB to use, of which {said(sampler)} are taken, and "
            f"its keys and values need {row:.3g}. Raise devices_per_sampler, or set learners: the others only sample"
        )
    rate, phases = hardware.bf16_tflops * 1e12 * hardware.mfu, dict[str, Phase]()
    sampled = prompts * generations * length
    reading = hardware.memory_gb_per_s * 1e9 * hardware.memory_bandwidth_share

    def sending(devices: int) -> float:
        slowest = hardware.network_gb_per_s if devices > hardware.devices else hardware.link_gb_per_s
        return min(slowest, hardware.link_gb_per_s) * 1e9 * hardware.network_share

    def passes(times: int, flops: float, sent: float) -> Phase:
        """Weights and gradients are on their way while others are computed with."""
        parts = {"arithmetic": flops / ranks / rate, "network": sent / sending(ranks)}
        return Phase(times * max(parts.values()), max(parts, key=parts.__getitem__), times * sent / 1e9)

    # Each prompt once; the last token of a completion is no input.
    tokens = (prompts * prompt_length + prompts * generations * (length - 1), sampled,
              prompts * seen_pairs(prompt_length, length - 1, generations))  # fmt: skip
    if spec.algorithm.logged is None:
        # For a token, weights are read once and every row's cache; what attention and the MLP give is added up over a
        # sampler's devices in every layer.
        times, cached = most / rows * length, rows * (prompt_length + length / 2)
        prompt = forward_flops(model, prompt_length, 0, seen_pairs(prompt_length, 0, 0))
        prefill = most / generations * prompt / per / rate
        read = step.compute * (model.linear + model.head) + cache_bytes(model, cached, step.compute)
        sent = times * 4 * model.layers * gather_bytes(step.compute * model.hidden * rows, per)
        parts = {"memory bandwidth": times * read / per / reading, "network": sent / sending(per),
                 "arithmetic": times * forward_flops(model, rows, rows, cached) / per / rate}  # fmt: skip
        seconds = prefill + max(parts["arithmetic"], parts["memory bandwidth"]) + parts["network"]
        parts["arithmetic"] += prefill
        phases["rollout"] = Phase(seconds, max(parts, key=parts.__getitem__), sent / 1e9)
        # New weights go from one learner to each machine of samplers; where all devices do both they are gathered.
        machines = -(-hardware.num_sampling // hardware.devices) if hardware.learners else 0
        size = 4 * step.trained * machines or gather_bytes(step.compute * step.trained, step.shards)
        phases["weights"] = Phase(size / sending(hardware.nodes * hardware.devices), "network", size / 1e9)
    gathered = step.microbatches * gather_bytes(step.compute * model.total, ranks) if step.shards > 1 else 0
    # The optimizer reads weight, gradient and moments, and writes all but the gradient.
    moved = updates * (12 + 2 * step.moments) * step.trained / step.shards
    phases |= {
        "reference": passes(reads, forward_flops(model, *tokens), gathered),
        "update": passes(updates, update_flops(model, step, *tokens), update_bytes(model, step, ranks)),
        "optimizer": Phase(moved / reading, "memory bandwidth"),
    }
    seconds = {name: phase.seconds for name, phase in phases.items()}
    longest, total = max(seconds, key=seconds.__getitem__), sum(seconds.values())
    bottleneck = f"{longest}, {seconds[longest] / total:.0%} of the seconds, by {phases[longest].bound}"
    if spec.sampling.max_staleness and hardware.learners:
        total = max(ahead := seconds.get("rollout", 0.0), total - ahead)
    return Estimate(model.total, ranks, samplers, fitting[0], room, memory, sampler | {"cache": rows * row}, rows,
                    phases, total, sampled / total, bottleneck)  # fmt: skip


def said(sizes: dict[str, float]) -> str:
    """`weights 1.2, update 3.4`"""
    return ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
