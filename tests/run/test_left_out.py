"""Rows left out of an update: what it costs every method, and what is done where a rank has none that carries any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_method import OF_TOKENS, SMOOTH, assert_near, gradients, make_loop
from torch import nn

from dar.algorithms.base import UpdateTokens
from dar.algorithms.realignment import IMPACT
from dar.algorithms.squared import OPTIMAL_VALUE
from dar.batch import Batch, TokenGroups, Weighted, pad_rows
from dar.errors import ConfigError
from dar.rollout.sampling import SamplingKey
from dar.run.loop import Loop

EOS = 0


def hostile_batch(loop: Loop, *, seed: int) -> Batch:
    """The policy's own completions of 1 to 60 tokens: a tenth is empty, and most of these have a reward of −5."""
    is_trace = loop.spec.algorithm.type == "trace"
    num_prompts, num_generations = (24, 2) if is_trace else (4, 12)
    stream = loop.collector.stream.at(0)
    loop.engine.sync(loop.learner.policy, 0)
    sampled = loop.engine.generate(
        [stream[index % len(stream)] for index in range(num_prompts)],
        num_generations,
        max_completion_length=60,
        key=SamplingKey(seed, "train", 1),
    ).groups
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 61, (sampled.num_rows,), generator=generator)
    lengths[torch.rand(sampled.num_rows, generator=generator) < 0.2] = 2
    is_empty = torch.rand(sampled.num_rows, generator=generator) < 0.1
    is_empty[:2] = True
    rows = [
        [EOS] if empty else ids[keep][:length].tolist()
        for ids, keep, length, empty in zip(sampled.completion_ids, sampled.mask, lengths, is_empty, strict=True)
    ]
    ids, mask = pad_rows(rows, pad_id=0)
    groups = TokenGroups(sampled.prompt_ids, sampled.group_sizes, ids, mask)
    rewards = torch.randn(num_prompts, num_generations, generator=generator)
    rewards[is_empty.reshape(rewards.shape) & (torch.rand(rewards.shape, generator=generator) < 0.7)] = -5.0
    labels = {}
    if is_trace:
        rewards, labels = (rewards > 0).float(), {IMPACT: torch.rand(num_prompts, 1, generator=generator).expand(-1, 2)}
    elif loop.spec.algorithm.type == "a_star_po":
        labels = {OPTIMAL_VALUE: torch.zeros(num_prompts, num_generations)}
    elif loop.spec.algorithm.type == "maxrl":
        rewards = (rewards + 5).clamp(min=0)
    old, reference = loop.learner.policy.logprobs(groups, max_tokens=4096), None
    if loop.learner.policy.has_reference:
        reference = old + 0.3 * torch.randn(mask.shape, generator=generator) * mask
    return Batch(
        groups=groups,
        old_logprobs=old * torch.nan if loop.spec.algorithm.logged else old,
        ref_logprobs=reference,
        rewards=rewards,
        has_eos=is_empty,
        values=loop.learner.policy.values(groups, max_tokens=4096) if loop.algorithm.needs_values else None,
        labels=labels,
    )


@pytest.mark.parametrize("algorithm", OF_TOKENS, ids=str)
def test_leaving_rows_out_changes_every_gradient_by_a_thousandth_at_most(tmp_path: Path, algorithm: Any):
    """The docs' bound is ten times the share: for its default of 1e-4, and for one that leaves more out."""
    found, skipped, scored = {}, {}, None
    for share in (0.0, 1e-4, 1e-2):
        runtime = {"device": "cpu", "precision": "fp32", "negligible_share": share}
        loop = make_loop(tmp_path / str(share), algorithm, optim=SMOOTH, runtime=runtime)
        scored = scored or hostile_batch(loop, seed=0)
        found[share] = gradients(loop)
        metrics = loop.learner.learn(1, loop.algorithm.weigh(scored)[0])
        skipped[share] = metrics["rows/skipped_fraction"]
    for share in (1e-4, 1e-2):
        assert len(found[share]) == loop.algorithm.updates
        for some, whole in zip(found[share], found[0.0], strict=True):
            assert_near(some, whole, share=10 * share)
    if algorithm in ("dar", "awr"):
        assert skipped[0.0] == 0.0
        assert skipped[1e-4] > 0.15
    if algorithm == "sft":
        assert skipped[1e-2] == 0.0


def test_gspo_is_grpo_without_its_kl_in_runs_too(tmp_path: Path):
    metrics, grads = [], []
    for algorithm in ("gspo", {"type": "grpo", "beta": 0.0}):
        runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 0.3}
        loop = make_loop(tmp_path / str(len(grads)), algorithm, optim=SMOOTH, runtime=runtime)
        grads.append(gradients(loop))
        metrics.append(loop.learner.learn(1, loop.algorithm.weigh(hostile_batch(loop, seed=0))[0]))
    assert metrics[0]["rows/skipped_fraction"] == metrics[1]["rows/skipped_fraction"] > 0
    assert_near(grads[0][0], grads[1][0], share=1e-5)


@pytest.mark.parametrize("name", ["gspo", "rloo", "ppo", "dr_grpo", "bnpo", "grpo"])
def test_an_empty_answer_with_a_bad_reward_becomes_less_likely(tmp_path: Path, name: str):
    runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 1e-2}
    loop = make_loop(tmp_path / "run", name, optim={"learning_rate": 1e-4}, runtime=runtime)
    scored = hostile_batch(loop, seed=0)
    empty = scored.groups.lengths == 1
    scored.rewards[:] = torch.where(empty.reshape(scored.rewards.shape), -5.0, 0.0)
    before = loop.learner.policy.logprobs(scored.groups, max_tokens=4096)[empty, 0]
    loop.learner.learn(1, loop.algorithm.weigh(scored)[0])
    assert (loop.learner.policy.logprobs(scored.groups, max_tokens=4096)[empty, 0] < before).all()


def test_a_correction_leaves_only_rows_of_weight_zero_out(tmp_path: Path):
    """Its factors are not known before the pass."""
    runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 0.1}
    skipped = []
    for correction in ("none", "token"):
        sampling = {"max_completion_length": 8, "correction": correction}
        loop = make_loop(tmp_path / correction, "dar", sampling=sampling, runtime=runtime)
        skipped.append(loop.step(1)["rows/skipped_fraction"])
    assert skipped[0] > 0.1
    assert skipped[1] == 0.0


# --- ranks without rows that carry any -------------------------------------------------------------------------------


def one_row(batch: Weighted) -> torch.Tensor:
    return torch.arange(batch.groups.num_rows) == 0


@pytest.mark.parametrize("name", ["bnpo", "rloo", "gspo", "cispo", "dppo", "bapo", "r2vpo", "ppo"])
def test_a_rank_without_rows_moves_and_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    loop = make_loop(tmp_path / "run", name)
    batch, _ = loop.algorithm.weigh(hostile_batch(loop, seed=0))
    # The second rank has the last of three groups, and the rows of the first two carry all weight.
    monkeypatch.setattr("dar.learn.learner.own_groups", lambda num_groups: (2, num_groups))
    own = loop.learner._own_rows(batch, batch.groups.rows_of(0, 2))
    assert torch.equal(own.groups.completion_ids, batch.groups.select(one_row(batch)).completion_ids)
    seen: list[UpdateTokens] = []
    begin = loop.algorithm.begin_update

    def spy(tokens: UpdateTokens) -> Any:
        seen.append(tokens)
        return begin(tokens)

    loop.algorithm.begin_update = spy
    loop.learner._begun(own, on_policy=True)
    assert [len(tokens.advantages) for tokens in seen] == ([0] if name == "bapo" else [])
    result = loop.learner.updater.step(loop.algorithm, own, on_policy=True, where="here")
    assert (result.loss, result.grad_norm, result.means) == (0.0, 0.0, {})


def test_a_batch_that_trains_nothing_leaves_the_penalty_alone(tmp_path: Path):
    sampling = {"max_completion_length": 1, "mask_truncated": True}
    loop = make_loop(tmp_path / "run", "r2vpo", sampling=sampling)
    before = loop.algorithm.state()
    metrics = loop.step(1)
    assert loop.algorithm.state() == before
    assert not {"r2vpo/variance", "rollout/logprob_gap"} & metrics.keys()


def test_training_what_the_model_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from conftest import make_model  # noqa: PLC0415

    model = make_model()
    model.requires_grad_(False)
    model.unread = nn.Parameter(torch.zeros(3))
    monkeypatch.setattr("test_every_method.make_model", lambda: model)
    loop = make_loop(tmp_path / "run", "dar")
    with pytest.raises(ConfigError, match=r"the loss at step 1 depends on nothing that is trained"):
        loop.step(1)
