"""Formulas of a step on paper, against what small models really do: operations, bytes sent, bytes kept."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.builders import make_groups
from support.handmade import make_spec
from support.ranks import as_if_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dar.assembly.memory import ModelShape, StepShape, cache_bytes, shape_of
from dar.assembly.plan import ROW_BYTES, TEXT_BYTES
from dar.assembly.scaling import estimate, forward_flops, gather_bytes, seen_pairs, update_bytes, update_flops
from dar.batch import Prompt, Rollouts
from dar.config.hardware import HardwareSpec
from dar.config.model import LoraSpec
from dar.errors import ConfigError
from dar.policies.precision import Precision
from dar.policies.protocol import Wants
from dar.policies.text.loading import add_lora, checkpoint_layers
from dar.policies.text.policy import Policy
from dar.rollout.in_process.cache import DecodeCache
from dar.rollout.in_process.engine import InProcessEngine
from dar.rollout.sampling import SamplingKey

P, K, LENGTH, T = 3, 4, 20, 16
PACKED, SAMPLED = P * LENGTH + P * K * (T - 1), P * K * T
STEP = StepShape(tokens=0, last=0, microbatches=1, rows=0, length=0, prompts=0, trained=0)


def policy_of(kind: str) -> tuple[Policy, ModelShape, StepShape]:
    """A policy without reference, its shape, and what of a step depends on how it is trained."""
    model: Any = make_model(num_hidden_layers=6, vocab_size=264)  # which four ranks share evenly
    shape, rank = shape_of(model.config), 4 if "lora" in kind else 0
    if rank:
        model = add_lora(model, LoraSpec(rank=rank))
    if "checkpointed" in kind:
        checkpoint_layers(model)
    precision = Precision(torch.device("cpu"), torch.float32)
    policy = Policy(model, make_tokenizer(), precision, temperature=1.0, with_reference=False)
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    return policy, shape, replace(STEP, trained=trained, rank=rank, is_checkpointed="checkpointed" in kind)


def full_groups() -> Any:
    groups = make_groups([T] * (P * K), [K] * P, [LENGTH] * P)
    return replace(groups, completion_ids=groups.completion_ids.clamp(min=0) % 261)


# FlopCounterMode does not know the CPU's attention kernels, so what it counts are the linear layers and the head.


def test_flops_of_a_pass_without_gradient():
    policy, shape, _ = policy_of("full")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        policy.outputs(full_groups(), Wants())
    assert counted.get_total_flops() == forward_flops(shape, PACKED, SAMPLED, 0)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # Below the first adapters nothing asks for a gradient; the last product of an adapter is not made again.
    [("full", 0), ("checkpointed", 0), ("lora", 0.02), ("lora checkpointed", 0.005)],
)
def test_flops_of_an_update(kind: str, tolerance: float):
    policy, shape, step = policy_of(kind)
    with FlopCounterMode(display=False) as counted, policy.training():
        policy.outputs(full_groups(), Wants()).logprobs.sum().backward()
    assert update_flops(shape, step, PACKED, SAMPLED, 0) == pytest.approx(counted.get_total_flops(), rel=tolerance)


def test_flops_of_attention():
    model = make_model()
    model.set_attn_implementation("eager")  # which leaves no pair out, whoever may see whom
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.arange(LENGTH).unsqueeze(0))
    products = counted.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert products == forward_flops(shape_of(model.config), 0, 0, LENGTH**2)
    prompt = [at + 1 for at in range(LENGTH)]
    completion = [LENGTH + at + 1 for at in range(T)]
    assert seen_pairs(LENGTH, T, K) == sum(prompt) + K * sum(completion)


def test_flops_and_cache_of_sampling(monkeypatch: pytest.MonkeyPatch):
    policy, shape, _ = policy_of("full")
    policy.eos_token_ids = (-1,)  # no token is that, so every completion has its full length
    kept, plain = [], DecodeCache.rearrange

    def rearrange(self: DecodeCache, *arguments: Any) -> None:
        plain(self, *arguments)
        layers = self._layers.values()
        kept.append(sum(each.nbytes for layer in layers for each in vars(layer).values()))

    monkeypatch.setattr(DecodeCache, "rearrange", rearrange)
    engine = InProcessEngine(max_tokens=10**9, in_place=True)
    engine.sync(policy, 0)
    prompts = [Prompt(index, "", tuple(range(20, 20 + LENGTH)), {}) for index in range(P)]
    with FlopCounterMode(display=False) as counted:
        engine.generate(prompts, K, max_completion_length=T, key=SamplingKey(0))
    assert counted.get_total_flops() == forward_flops(shape, PACKED, SAMPLED, 0)
    assert max(kept) == cache_bytes(shape, P * LENGTH + SAMPLED)


def test_bytes_of_sampled_rows():
    rows, length = 64, 256
    groups = make_groups([length] * rows, [4] * 16, [3] * 16)
    prompts = tuple(Prompt(index, "", (1, 2, 3), {}) for index in range(16))
    texts = tuple("abcd" * length for _ in range(rows))
    found = pickle.dumps(Rollouts(prompts, groups, texts, torch.zeros(rows, length), ("length",) * rows))
    assert (ROW_BYTES + TEXT_BYTES) * rows * length == pytest.approx(len(found), rel=0.03)


class Sent(TorchDispatchMode):
    """Bytes of whole tensors that are gathered, and that are added up and kept in parts."""

    gathered = scattered = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = max((each.nbytes for each in tree_leaves(args) if isinstance(each, Tensor)), default=0)
        self.gathered += size * ("allgather_base" in str(function))
        self.scattered += size * ("reduce_scatter_base" in str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["full", "checkpointed", "lora"])
def test_bytes_that_ranks_of_sharded_weights_send(kind: str):
    policy, shape, step = policy_of(kind)
    with as_if_of(4):
        policy.share("full")
        with torch.no_grad(), Sent() as read:
            policy.outputs(full_groups(), Wants())
        with policy.training(), Sent() as updated:
            policy.outputs(full_groups(), Wants()).logprobs.sum().backward()
    adapters = 4 * step.trained if "lora" in kind else 0
    assert (read.gathered, read.scattered) == (4 * shape.total + adapters, 0)
    assert updated.scattered == 4 * step.trained
    sent = gather_bytes(updated.gathered + updated.scattered, 4)
    # The norms of layers, too, are gathered twice.
    assert update_bytes(shape, replace(step, shards=4, microbatches=3), 4) == pytest.approx(3 * sent, rel=0.01)


def test_bytes_that_replicas_send():
    policy, shape, step = policy_of("full")
    counted = []

    def count(_, bucket):
        counted.append(bucket.buffer().nbytes)
        found = torch.futures.Future()
        found.set_result(bucket.buffer())
        return found

    with as_if_of(4):
        policy.share("none")
        trained: Any = policy.trained
        trained.register_comm_hook(None, count)
        policy.outputs(full_groups(), Wants()).logprobs.sum().backward()
    assert update_bytes(shape, step, 4) == 2 * gather_bytes(sum(counted), 4)


FAST: dict[str, Any] = {
    "devices": 4, "memory_gb": 1.0, "bf16_tflops": 1e9, "memory_gb_per_s": 1e9, "link_gb_per_s": 1e9,
    "network_gb_per_s": 1e9, "mfu": 1.0, "memory_bandwidth_share": 1.0, "network_share": 1.0, "memory_share": 1.0,
}  # fmt: skip


def on(hardware: dict[str, Any], step: StepShape = STEP, **recipe: Any) -> Any:
    """A step of 8 prompts of 20 tokens with 4 completions of 16."""
    shape = shape_of(make_model().config)
    step = replace(step, trained=step.trained or shape.total, compute=2)
    spec = make_spec(prompts_per_step=8, sampling={"max_completion_length": T, **recipe.pop("sampling", {})}, **recipe)
    work = {"prompt_length": LENGTH, "generations": K, "reads": 1, "updates": 2}
    return shape, step, estimate(shape, step, spec, HardwareSpec(**FAST | hardware), **work)


def test_a_token_takes_one_reading_of_weights_and_of_every_rows_cache():
    shape, _, found = on({"memory_gb_per_s": 1e-3, "devices_per_sampler": 2, "bf16_tflops": 1e12})
    assert (found.learners, found.samplers, found.rows_at_once) == (4, 2, 4 * K)
    read = 2 * (shape.linear + shape.head) + cache_bytes(shape, 4 * K * (LENGTH + T / 2), 2)
    assert found.phases["rollout"].seconds == pytest.approx(T * read / 2 / 1e6)
    assert found.phases["rollout"].bound == "memory bandwidth"
    # fp32 weights and gradients, two moments, all replicated: 28 bytes read and written.
    assert found.phases["optimizer"].seconds == pytest.approx(2 * 28 * shape.total / 1e6)


def test_the_slower_of_arithmetic_and_network_bounds_an_update():
    shape, step, found = on({"bf16_tflops": 1e-3, "nodes": 2})
    tokens = (8 * LENGTH + 8 * K * (T - 1), 8 * K * T, 8 * seen_pairs(LENGTH, T - 1, K))
    assert found.phases["update"].seconds == pytest.approx(2 * update_flops(shape, step, *tokens) / 8 / 1e9)
    assert found.bottleneck.endswith("by arithmetic")
    shape, step, found = on({"network_gb_per_s": 1e-3, "nodes": 2}, runtime={"sharding": "full"})
    sent = update_bytes(shape, replace(step, shards=8), 8)
    assert found.phases["update"].seconds == pytest.approx(2 * sent / 1e6)
    assert found.phases["update"].sent_gb == pytest.approx(2 * sent / 1e9)
    assert found.bottleneck.endswith("by network")
    # Within one machine the network between machines is nobody's.
    assert on({"network_gb_per_s": 1e-3}, runtime={"sharding": "full"})[2].phases["update"].seconds < 1e-6


def test_samplers_of_their_own_get_weights_and_may_go_ahead():
    slow = {"nodes": 3, "learners": 4, "network_gb_per_s": 1e-3, "memory_gb_per_s": 1e-3}
    shape, _, found = on(slow)
    # To the two machines of samplers, from one learner.
    assert found.phases["weights"].seconds == pytest.approx(2 * 4 * shape.total / 1e6)
    assert found.seconds == pytest.approx(sum(phase.seconds for phase in found.phases.values()))
    ahead = on(slow, sampling={"max_staleness": 1}, cluster="local")[2]
    rollout = ahead.phases["rollout"].seconds
    assert ahead.seconds == pytest.approx(max(rollout, found.seconds - rollout))


def test_what_does_not_fit_with_replicas_is_sharded_and_what_fits_nowhere_is_refused():
    held = on({})[2].memory_gb["none"]["update"]
    found = on({"memory_gb": held * 0.99})[2]
    assert found.sharding == "full"
    with pytest.raises(
        ConfigError, match=r"cannot be trained on 4 of these devices: .* runtime.sharding=full takes weights"
    ):
        on({"memory_gb": held / 4})
    adapter, weights = replace(STEP, rank=1, trained=10, base_bytes=2), 2 * shape_of(make_model().config).total / 1e9
    with pytest.raises(ConfigError, match=r"no completion fits a sampler: .* Raise devices_per_sampler"):
        on({"memory_gb": weights + 1e-6, "learners": 2}, adapter)
    with pytest.raises(ConfigError, match="each of 12 learners or samplers needs a prompt"):
        on({"nodes": 3})
