"""A step's completions: of the stream's prompts in the stream's order, whichever rank asks for its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from support.engines import engine_of
from support.handmade import make_spec

from dar.batch import Prompt, Rollouts
from dar.config.data import DataSpec, SourceSpec
from dar.config.reward import RewardSpec
from dar.data.logged import LoggedSet, prepare_logged
from dar.data.prompts import PromptStream, prepare_prompts
from dar.learn.ranks import join_scored
from dar.policies.precision import Precision
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import prompt_ids
from dar.rewards import Reward, RewardSet, RewardTable
from dar.run.ahead import Ahead
from dar.run.collect import Collector, LoggedCollector, OnlineCollector

ROWS = [
    {
        "prompt": f"{name}?",
        "name": name,
        "completions": [name * length, "no"],
        "rewards": [float(length), -1.0],
    }
    for length, name in enumerate("abcde", start=1)
]
SPEC = DataSpec(train=SourceSpec(path="rows.jsonl"))


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def online(*, seed: int = 3, progress: Any = None, algorithm: Any = "dar") -> OnlineCollector:
    """Two completions of up to 6 tokens for each of three prompts a step."""
    tokenizer = make_tokenizer()
    policy = Policy(
        make_model(), tokenizer, Precision(torch.device("cpu"), torch.float32), temperature=1.0, with_reference=False
    )
    prompts = prepare_prompts(ROWS, partial(prompt_ids, tokenizer), SPEC, max_prompt_length=None, where="rows.jsonl")
    spec = make_spec(num_generations=2, sampling={"max_completion_length": 6}, seed=seed, algorithm=algorithm)
    return OnlineCollector(
        spec=spec,
        policy=policy,
        engine=engine_of(policy, max_tokens=1000),
        rewards=RewardSet([Reward("even", even_share, RewardSpec(weight=2.0))]),
        stream=PromptStream(prompts, prompts_per_step=3, seed=seed),
        progress=progress or (lambda tokens: None),
        ahead=Ahead(spec),
    )


def logged_set(*, max_completion_length: int = 50) -> LoggedSet:
    return prepare_logged(
        ROWS,
        make_tokenizer(),
        SPEC,
        kind="rewards",
        eos_token_ids=(0,),
        max_prompt_length=None,
        max_completion_length=max_completion_length,
        where="rows.jsonl",
    )


def logged(*, seed: int = 3, **settings: Any) -> LoggedCollector:
    found = logged_set(**settings)
    return LoggedCollector(found, PromptStream(found.prompts, prompts_per_step=3, seed=seed))


class Phases:
    """Which parts of the step were timed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.names.append(name)
        yield


def collect(collector: Collector, step: int, first: int = 0, stop: int = 3) -> tuple[Rollouts, RewardTable]:
    rollouts, pending = collector.collect(step, first, stop, phase=Phases())
    return rollouts, pending.finish()


def drawn(collector: Collector, num_steps: int) -> list[Prompt]:
    return [prompt for step in range(1, num_steps + 1) for prompt in collect(collector, step)[0].prompts]


def decoded(rollouts: Rollouts) -> list[str]:
    """The rows' tokens as the model reads them, special tokens included."""
    tokenizer, groups = make_tokenizer(), rollouts.groups
    return [str(tokenizer.decode(ids[mask])) for ids, mask in zip(groups.completion_ids, groups.mask, strict=True)]


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [online, logged])
def test_prompts_come_in_the_order_of_the_stream(make: Any):
    collector = make()
    found = drawn(collector, 4)
    # Steps count from 1, the stream and its positions from 0.
    assert [prompt.position for prompt in found] == list(range(12))
    assert found == [prompt for step in range(4) for prompt in collector.stream.at(step)]
    # Two epochs of five prompts, each prompt once in each.
    names = [prompt.columns["name"] for prompt in found]
    assert sorted(names[:5]) == sorted(names[5:10]) == list("abcde")


@pytest.mark.parametrize("make", [online, logged])
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_shares_of_the_ranks_make_up_the_whole(make: Any, cuts: tuple[int, ...]):
    collector = make()
    bounds = [0, *cuts, 3]
    parts = [collect(collector, 2, *bounds[index : index + 2]) for index in range(len(bounds) - 1)]
    joined, table, *_ = join_scored([(rollouts, rewards, None, None) for rollouts, rewards in parts])
    rollouts, rewards = collect(collector, 2)
    assert joined.prompts == rollouts.prompts
    assert joined.groups.prompt_ids == rollouts.groups.prompt_ids
    assert joined.groups.group_sizes == rollouts.groups.group_sizes == (2, 2, 2)
    assert joined.texts == rollouts.texts
    assert joined.finish_reasons == rollouts.finish_reasons
    assert torch.equal(joined.groups.completion_ids, rollouts.groups.completion_ids)
    assert torch.equal(joined.groups.mask, rollouts.groups.mask)
    # Other prompts beside it change the order of a row's sums, and so the last bits of its log-probabilities.
    torch.testing.assert_close(joined.logprobs, rollouts.logprobs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(table.total, rewards.total)


@pytest.mark.parametrize("make", [online, logged])
def test_step_does_not_depend_on_the_steps_before(make: Any):
    collector = make()
    collect(collector, 1)
    again, alone = collect(collector, 3)[0], collect(make(), 3)[0]
    assert torch.equal(again.groups.completion_ids, alone.groups.completion_ids)
    assert again.prompts == alone.prompts


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_scored_with_their_columns_and_timed():
    phases = Phases()
    rollouts, pending = online().collect(1, 0, 3, phase=phases)
    rewards = pending.finish()
    assert phases.names == ["rollout", "reward", "reward"]
    rows = [ids[mask].tolist() for ids, mask in zip(rollouts.groups.completion_ids, rollouts.groups.mask, strict=True)]
    expected = torch.tensor(even_share(rows)).reshape(3, 2)
    assert torch.equal(rewards.parts["even"], expected)
    assert torch.equal(rewards.total, 2 * expected)
    assert rollouts.groups.mask.shape[1] <= 6
    assert (rollouts.logprobs[rollouts.groups.mask] < 0).all()


def test_samples_depend_on_seed_and_step():
    def tokens(seed: int, step: int) -> list[str]:
        return decoded(collect(online(seed=seed), step)[0])

    assert tokens(3, 1) == tokens(3, 1)
    assert tokens(3, 1) != tokens(4, 1)
    assert tokens(3, 1) != tokens(3, 2)


def test_sampled_tokens_are_reported_as_they_come():
    sampled: list[int] = []
    rollouts, _ = collect(online(progress=sampled.append), 1)
    assert sum(sampled) == int(rollouts.groups.mask.sum())


# --- the data's ------------------------------------------------------------------------------------------------------


def test_completions_of_the_data_come_with_their_prompt_and_reward():
    rollouts, rewards = collect(logged(), 1)
    names = [str(prompt.columns["name"]) for prompt in rollouts.prompts]
    lengths = ["abcde".index(name) + 1 for name in names]
    whole = [text for name, length in zip(names, lengths, strict=True) for text in (name * length, "no")]
    assert list(rollouts.texts) == whole
    assert decoded(rollouts) == [f"{text}<eos>" for text in whole]
    tokenizer = make_tokenizer()
    assert [tokenizer.decode(list(ids)) for ids in rollouts.groups.prompt_ids] == [f"{name}?" for name in names]
    assert rollouts.groups.group_sizes == (2, 2, 2)
    assert rewards.total.tolist() == [[float(length), -1.0] for length in lengths]
    assert rewards.total.dtype == torch.float32
    assert rewards.parts == {}


def test_nobody_knows_the_log_probabilities_of_the_data():
    rollouts, _ = collect(logged(), 1)
    mask = rollouts.groups.mask
    assert not mask.all()
    assert rollouts.logprobs.shape == mask.shape
    assert rollouts.logprobs[mask].isnan().all()
    assert (rollouts.logprobs[~mask] == 0).all()


def test_data_is_neither_sampled_nor_scored():
    phases = Phases()
    logged().collect(1, 0, 3, phase=phases)
    assert phases.names == []


def test_a_completion_that_was_cut_did_not_end_by_itself():
    # Three tokens of room: "a" and "bb" are followed by EOS, "ccc" and longer fill it, and "no" takes two and EOS.
    rollouts, _ = collect(logged(max_completion_length=3), 1, 0, 3)
    names = [prompt.columns["name"] for prompt in rollouts.prompts]
    expected = [reason for name in names for reason in ("eos" if name in "ab" else "length", "eos")]
    assert list(rollouts.finish_reasons) == expected
    assert {"eos", "length"} == set(rollouts.finish_reasons[::2])
