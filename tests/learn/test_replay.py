"""The replay buffer, and what a run does with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from support.builders import make_scored
from support.handmade import make_spec
from torch import Tensor

from dar.assembly.algorithm import build_algorithm
from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.batch import Weighted
from dar.config.actor_critic import PPOSpec
from dar.config.algorithms import AnyAlgorithm
from dar.config.policy_gradient import R2VPOSpec
from dar.config.regression import DARSpec
from dar.learn.replay import ReplayBuffer
from dar.run.loop import Loop


def make_batch(spec: AnyAlgorithm, reward: float) -> Weighted:
    scored = make_scored([[reward, 3], [1, 2]], [[-1.0], [-2.0, -3.0], [-4.0], [-5.0]], [[-1.0]] * 4, extra=1)
    scored = replace(scored, ref_logprobs=scored.old_logprobs - 1, values=scored.old_logprobs + 1)
    return build_algorithm(spec, max_completion_length=8).weigh(scored)[0]


def tensors_of(batch: Weighted) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map(note, note)
    return found


def assert_same(one: Weighted, other: Weighted) -> None:
    assert one.groups.prompt_ids == other.groups.prompt_ids
    assert one.groups.group_sizes == other.groups.group_sizes
    assert one.denominator == other.denominator
    assert (one.ref_logprobs is None) == (other.ref_logprobs is None)
    assert one.tokens.keys() == other.tokens.keys()
    torch.testing.assert_close(tensors_of(one), tensors_of(other), rtol=0, atol=0)


def test_newest_batches_are_kept_oldest_first():
    batches = [make_batch(R2VPOSpec(), reward) for reward in (1.0, 5.0, 9.0)]
    buffer = ReplayBuffer(2)
    assert buffer.batches == []
    for batch in batches:
        buffer.add(batch)
    assert [id(batch) for batch in buffer.batches] == [id(batches[1]), id(batches[2])]


def test_buffer_of_size_zero_keeps_nothing():
    buffer = ReplayBuffer(0)
    buffer.add(make_batch(R2VPOSpec(), 1.0))
    assert buffer.batches == []
    assert buffer.state() == {}


# One advantage per row and one per token, with further token quantities, with and without a reference.
@pytest.mark.parametrize("spec", [R2VPOSpec(), PPOSpec(), DARSpec()], ids=lambda spec: spec.type)
@pytest.mark.parametrize("has_reference", [True, False])
def test_batches_come_back_from_a_file(tmp_path: Path, spec: Any, has_reference: bool):
    buffer, other = ReplayBuffer(3), ReplayBuffer(3)
    for reward in (1.0, 5.0, 9.0):
        batch = make_batch(spec, reward)
        buffer.add(batch if has_reference else replace(batch, ref_logprobs=None))
    save_file(buffer.state(), tmp_path / "replay.safetensors")
    other.restore(load_file(tmp_path / "replay.safetensors"))
    assert len(other.batches) == 3
    for one, restored in zip(buffer.batches, other.batches, strict=True):
        assert_same(one, restored)


def test_more_than_ten_batches_come_back_in_order():
    buffer, other = ReplayBuffer(12), ReplayBuffer(12)
    for reward in range(12):
        buffer.add(make_batch(DARSpec(), float(reward)))
    other.restore(buffer.state())
    for one, restored in zip(buffer.batches, other.batches, strict=True):
        assert_same(one, restored)


def test_restoring_nothing_empties_the_buffer():
    buffer = ReplayBuffer(2)
    buffer.add(make_batch(DARSpec(), 1.0))
    buffer.restore({})
    assert buffer.batches == []


def make_loop(folder: Path, **changes: Any) -> Loop:
    settings: dict[str, Any] = {
        "algorithm": {"type": "r2vpo", "replay": 2, "updates": 2},
        "rewards": [{"type": "length", "target": 3}],
        "sampling": {"max_completion_length": 6},
        "optim": {"learning_rate": 1e-2},
        "prompts_per_step": 2,
        "num_generations": 3,
        "steps": 5,
        "output_dir": str(folder / "run"),
        "logging": {"old_kl_prompts": 0, "completions_every": 0},
        "runtime": {"device": "cpu", "precision": "fp32"},
    }
    rows = [{"prompt": "say a"}, {"prompt": "say b"}, {"prompt": "say c"}]
    objects = Objects(model=make_model(), tokenizer=make_tokenizer(), train_rows=rows)
    return build_loop(make_spec(**settings | changes), objects, quiet=True)


def test_run_trains_once_more_on_each_kept_batch(tmp_path: Path):
    loop = make_loop(tmp_path)
    trained: list[Weighted] = []
    update = loop.learner.updater.step

    def spy(algorithm: Any, batch: Weighted, **others: Any) -> Any:
        trained.append(batch)
        return update(algorithm, batch, **others)

    loop.learner.updater.step = spy
    sampled: list[Weighted] = []
    metrics = {}
    for step in range(1, 5):
        trained.clear()
        metrics = loop.step(step)
        earlier = sampled[-2:]
        # Two updates on the new batch, then one on each of at most two earlier ones, the older first.
        assert len(trained) == 2 + len(earlier)
        for batch, kept in zip(trained[2:], earlier, strict=True):
            assert_same(batch, kept)
        assert ("loss/replay" in metrics) == (step > 1)
        assert ("replay/r2vpo/variance" in metrics) == (step > 1)
        sampled.append(loop.learner.replay.batches[-1])
    # The policy has moved since: the ratio of an earlier batch is not 1.
    assert metrics["replay/r2vpo/variance"] > 1e-3


def test_every_replayed_batch_moves_the_penalty(tmp_path: Path):
    loop = make_loop(tmp_path, algorithm={"type": "r2vpo", "replay": 1, "updates": 1, "penalty_rate": 0.5})
    loop.step(1)
    before = loop.algorithm.state()["penalty"]
    metrics = loop.step(2)
    steps = [metrics["r2vpo/variance"] - 0.04, metrics["replay/r2vpo/variance"] - 0.04]
    assert metrics["r2vpo/penalty"] == pytest.approx(max(0.0, before + 0.5 * steps[0]))
    assert loop.algorithm.state()["penalty"] == metrics["replay/r2vpo/penalty"]
    assert metrics["replay/r2vpo/penalty"] == pytest.approx(max(0.0, metrics["r2vpo/penalty"] + 0.5 * steps[1]))


def test_replayed_batch_with_a_correction_can_be_saved(tmp_path: Path):
    """The sampler's log-probabilities are kept with the batch; its old ones are the same tensor."""
    loop = make_loop(tmp_path, sampling={"max_completion_length": 6, "correction": "token"}, steps=2)
    assert loop.run(resume=False) == 2
