"""Dynamic sampling: which groups a batch has, what of the stream and of the rewards that takes, and that it repeats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.engines import engine_of
from support.flows import ROWS as LABELS
from support.flows import flow_recipe
from support.handmade import make_spec
from support.ranks import on_ranks
from support.rows import write_rows
from torch import Tensor

from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.assembly.trial import try_step
from dar.batch import Rollouts
from dar.config.data import DataSpec, SourceSpec
from dar.config.recipe import load_recipe
from dar.config.reward import RewardSpec
from dar.data.prompts import PromptStream, prepare_prompts
from dar.errors import ConfigError, RewardError, RolloutError
from dar.policies.precision import Precision
from dar.policies.text.policy import Policy
from dar.policies.text.rendering import prompt_ids
from dar.rewards import Failed, Reward, RewardSet, RewardTable
from dar.rollout.sampling import SamplingKey
from dar.run.ahead import Ahead
from dar.run.resample import ResamplingCollector
from dar.trainer import run_loop

UNREPEATABLE = ("time/", "step_time", "memory/")
WORDS = list("abcdefghijkl")
WriteRecipe = Callable[..., Path]


class Told:
    """A reward of a group's rows 0, 1, … in their order, or of one value for the groups that are to be tied; it says of
    how many completions it was asked since it last said so."""

    def __init__(self) -> None:
        self.tied: set[str] = set()
        self.failing: set[str] = set()
        self.asked = 0

    def __call__(self, name: list[str], group_ids: list[int], log_metric: Any, log_extra: Any) -> list[Any]:
        self.asked += len(name)
        log_extra("of", name)
        log_metric("tied", float(name[0] in self.tied))
        return [
            Failed("cut off") if each in self.failing and row % 3 else 1.0 if each in self.tied else float(row % 3)
            for row, each in enumerate(name)
        ]

    def metrics(self) -> dict[str, float]:
        asked, self.asked = self.asked, 0
        return {"asked": asked}


class Hand:
    """Three prompts a step, three completions of each, of a stream of twelve words."""

    def __init__(self, *, max_rounds: int = 5, **reward: Any) -> None:
        tokenizer, self.told = make_tokenizer(), Told()
        cpu = Precision(torch.device("cpu"), torch.float32)
        policy = Policy(make_model(), tokenizer, cpu, temperature=1.0, with_reference=False)
        rows = [{"prompt": f"{word}?", "name": word} for word in WORDS]
        data = DataSpec(train=SourceSpec(path="rows.jsonl"))
        prompts = prepare_prompts(
            rows, partial(prompt_ids, tokenizer), data, max_prompt_length=None, where="rows.jsonl"
        )
        sampling = {"max_completion_length": 6, "resample_tied": {"max_rounds": max_rounds}}
        spec = make_spec(prompts_per_step=3, num_generations=3, sampling=sampling, seed=3)
        self.stream = PromptStream(prompts, prompts_per_step=3, seed=3)
        self.engine, self.phases = engine_of(policy, max_tokens=1000), list[str]()
        self.collector = ResamplingCollector(
            spec=spec,
            policy=policy,
            engine=self.engine,
            rewards=RewardSet([Reward("told", self.told, RewardSpec(**reward))]),
            stream=self.stream,
            progress=lambda tokens: None,
            ahead=Ahead(spec),
        )

    def names(self, *positions: int) -> set[str]:
        """Of the prompts at these places of the stream."""
        return {str(self.stream.draw(each, 1)[0].columns["name"]) for each in positions}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def collect(self, step: int, first: int = 0, stop: int = 3) -> tuple[Rollouts, RewardTable]:
        rollouts, known = self.collector.collect(step, first, stop, phase=self.phase)
        return rollouts, known.finish()


def positions(rollouts: Rollouts) -> list[int]:
    return [prompt.position for prompt in rollouts.prompts]


# --- which groups ----------------------------------------------------------------------------------------------------


def test_tied_groups_are_replaced_by_the_next_prompts_until_the_batch_is_full():
    hand = Hand()
    # Of 0, 1, 2 two are tied; of 3, 4, which come in their place, one; 5 is not.
    hand.told.tied = hand.names(1, 2, 4)
    rollouts, table = hand.collect(1)
    assert positions(rollouts) == [0, 3, 5]
    assert table.total.tolist() == [[0.0, 1.0, 2.0]] * 3
    assert table.extra["told/of"] == [name for each in (0, 3, 5) for name in [*hand.names(each)] * 3]
    assert hand.phases == ["rollout"] + ["rollout", "reward"] * 3 + ["reward"]
    # The next step begins where this one ended; nothing is drawn twice before all was drawn once.
    hand.told.tied = set()
    assert positions(hand.collect(2)[0]) == [6, 7, 8]
    assert [prompt.position for prompt in hand.stream.at(2)] == [9, 10, 11]
    assert hand.names(*range(12)) == set(WORDS)
    assert [hand.stream.epoch(step) for step in (0, 1, 2, 3)] == [0, 0.5, 0.75, 1]


def test_a_completion_is_what_its_prompt_would_have_had_in_any_round():
    hand = Hand()
    hand.told.tied = hand.names(1, 2, 4)
    rollouts, _ = hand.collect(1)
    key = SamplingKey(3, "train", 1)
    for index, position in enumerate((0, 3, 5)):
        alone = hand.engine.generate(hand.stream.draw(position, 1), 3, max_completion_length=6, key=key)
        rows = slice(3 * index, 3 * index + 3)
        width = alone.groups.mask.shape[1]
        assert torch.equal(rollouts.groups.completion_ids[rows, :width].where(alone.groups.mask, torch.tensor(-1)),
                           alone.groups.completion_ids.where(alone.groups.mask, torch.tensor(-1)))  # fmt: skip
        assert rollouts.groups.mask[rows].sum() == alone.groups.mask.sum()
        torch.testing.assert_close(rollouts.logprobs[rows, :width], alone.logprobs, rtol=1e-4, atol=1e-5)
        assert rollouts.texts[rows] == alone.texts
        assert rollouts.finish_reasons[rows] == alone.finish_reasons
        assert rollouts.groups.prompt_ids[index] == alone.groups.prompt_ids[0]
    assert rollouts.versions == (0,) * 9


def test_at_the_bound_the_last_round_stays_as_it_is():
    hand = Hand(max_rounds=1)
    hand.told.tied = hand.names(1, 2, 4)
    rollouts, table = hand.collect(1)
    assert positions(rollouts) == [0, 3, 4]
    assert table.total.tolist() == [[0.0, 1.0, 2.0]] * 2 + [[1.0] * 3]
    assert table.reported["rollout/rounds"] == 2
    assert [prompt.position for prompt in hand.stream.at(1)] == [5, 6, 7]


def test_where_all_is_tied_the_batch_is_the_last_round():
    hand = Hand(max_rounds=2)
    hand.told.tied = set(WORDS)
    assert positions(hand.collect(1)[0]) == [6, 7, 8]
    # A prompt of the next epoch is another draw of the stream.
    assert positions(hand.collect(2)[0]) == [15, 16, 17]


def test_groups_with_fewer_than_two_scored_completions_are_replaced_too():
    hand = Hand(on_failure="drop", max_failed_share=0.5)
    hand.told.failing = hand.names(1)
    rollouts, table = hand.collect(1)
    assert positions(rollouts) == [0, 2, 3]
    assert not table.total.isnan().any()
    # Two of the twelve that were scored.
    assert table.reported["rewards/told/failed_fraction"] == pytest.approx(2 / 12)


def test_a_share_of_failures_is_one_of_a_batch_however_few_groups_a_round_has():
    hand = Hand(on_failure="drop", max_failed_share=0.25)
    hand.told.tied, hand.told.failing = hand.names(0), hand.names(3)
    # Two of the three completions of the second round, but of the nine of a batch.
    assert positions(hand.collect(1)[0]) == [1, 2, 4]
    hand = Hand(on_failure="drop", max_failed_share=0.2)
    hand.told.tied, hand.told.failing = hand.names(0), hand.names(3)
    with pytest.raises(RewardError, match=r"'told' failed for 2 of 3 completions at step 1, more than"):
        hand.collect(1)


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_all_that_was_sampled_and_scored_is_counted():
    hand = Hand()
    hand.told.tied = hand.names(1, 2, 4)
    rollouts, table = hand.collect(1)
    everything = hand.engine.generate(
        hand.stream.draw(0, 6), 3, max_completion_length=6, key=SamplingKey(3, "train", 1)
    )
    said = {name: value for name, value in table.reported.items() if name.startswith("rollout/")}
    assert said == {
        "rollout/rounds": 3,
        "rollout/tied_fraction": 3 / 6,
        "rollout/replaced_fraction": 3 / 6,
        "rollout/discarded_tokens": everything.num_tokens - rollouts.num_tokens,
        "rollout/num_scored": 18,
    }
    # Three rows of each prompt, which is a letter and a question mark.
    assert everything.num_tokens == 6 * 3 * 2 + int(everything.groups.lengths.sum())
    # A function is asked what it has to say once a step, of every round.
    assert table.reported["rewards/told/asked"] == 18
    # The mean of the calls: the first group of the second round is not tied, that of the others neither.
    assert table.metrics()["rewards/told/tied"] == 0
    assert table.logged["rewards/told/tied"] == [0.0] * 3
    hand.told.tied = set()
    reported = hand.collect(2)[1].reported
    assert reported["rewards/told/asked"] == 9
    assert (reported["rollout/tied_fraction"], reported["rollout/discarded_tokens"]) == (0, 0)
    assert reported["rollout/num_scored"] == 27


def test_statistics_are_over_the_batch_and_not_over_what_was_thrown_away():
    hand = Hand(standardize=True, weight=2.0)
    hand.told.tied = hand.names(1, 2, 4)
    _, table = hand.collect(1)
    # 0, 1, 2 three times: mean 1 and deviation √(2/3); the ties of 1 thrown away would have made it smaller.
    expected = 2 * (torch.tensor([[0.0, 1.0, 2.0]] * 3) - 1) / (2 / 3) ** 0.5
    torch.testing.assert_close(table.total, expected)
    assert table.metrics()["rewards/told/std"] == pytest.approx(0.75**0.5)


# --- runs ------------------------------------------------------------------------------------------------------------


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)} for row in rows]


def train(recipe: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    spec = load_recipe(recipe, overrides)
    run_loop(build_loop(spec, resume=resume, quiet=True), resume=resume, command="test")
    return metrics_of(Path(spec.output_dir))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def choosy(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRecipe:
    """A recipe whose completions are as good as they are long, and those of every other word all alike."""
    (tmp_path / "choosy.py").write_text(
        "def choosy(name, completions):\n"
        "    return [0.0 if each in 'acegik' else len(str(text)) + ord(str(text)[0]) / 999\n"
        "            for each, text in zip(name, completions)]\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {word}: ", "name": word, "ref_rewards": [0.0, 1.0]} for word in WORDS]

    def write(**changes: Any) -> Path:
        sampling = {"max_completion_length": 8, "resample_tied": {"max_rounds": 8}}
        settings = {"prompts_per_step": 3, "steps": 4, "rewards": ["choosy:choosy"], "sampling": sampling, "seed": 1}
        data = str(write_rows(tmp_path / "words.jsonl", rows))
        return write_recipe(**{"data": data, "logging": {"completions_every": 1}, **settings, **changes})

    return write


@pytest.mark.parametrize("algorithm", ["dapo", "dar", "online_dpo", "a_star_po"])
def test_a_run_learns_from_full_batches_and_counts_what_they_took(
    choosy: WriteRecipe, tmp_path: Path, algorithm: str
) -> None:
    rows = train(choosy(algorithm=algorithm))
    assert all(row["frac_reward_zero_std"] == 0 for row in rows)
    assert sum(row["rollout/rounds"] > 1 for row in rows) >= 3
    drawn = 0
    for step, row in enumerate(rows, start=1):
        table = pd.read_parquet(tmp_path / "run" / "completions" / f"step-{step}.parquet")
        found = table["position"].drop_duplicates().tolist()
        before, drawn = drawn, round(row["epoch"] * 12)
        assert len(table) == 12
        # Of consecutive prompts all but the tied ones, to the last, with which the batch was full.
        assert len(found) == 3
        assert before <= found[0] < found[1] < found[2] < drawn
        assert row["rollout/num_scored"] == 4 * drawn
        assert (
            row["rollout/replaced_fraction"] == row["rollout/tied_fraction"] == pytest.approx(1 - 3 / (drawn - before))
        )
        tokens = row["num_tokens"] - (rows[step - 2]["num_tokens"] if step > 1 else 0)
        batch = row["tokens/prompt"] * 4 + row["tokens/completion"]
        assert tokens == batch + row["rollout/discarded_tokens"]
        assert (row["rollout/discarded_tokens"] > 0) == (drawn - before > 3)


def test_dapo_divides_by_the_tokens_of_a_full_batch(choosy: WriteRecipe) -> None:
    loop = build_loop(load_recipe(choosy(algorithm="dapo")), quiet=True)
    seen: list[Any] = []
    learn = loop.learner.learn
    loop.learner.learn = lambda step, weighted, **others: (seen.append(weighted), learn(step, weighted, **others))[1]
    metrics = loop.step(1)
    assert seen[0].rewards.shape == (3, 4)
    assert seen[0].denominator == metrics["tokens/completion"] == int(seen[0].mask.sum())
    assert metrics["rollout/rounds"] > 1


def test_without_ties_nothing_is_another_run(choosy: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "lively.py").write_text(
        "import zlib\n"
        "def lively(completions):\n"
        "    return [float(zlib.crc32(str(text).encode()) % 997) for text in completions]\n"
    )
    recipe = choosy(rewards=["lively:lively"])
    plain = train(recipe, "sampling.resample_tied=null", f"output_dir={tmp_path / 'plain'}")
    resampled = train(recipe, f"output_dir={tmp_path / 'resampled'}")
    assert all(row["frac_reward_zero_std"] == 0 for row in plain)
    for row, before in zip(resampled, plain, strict=True):
        extra = {key: row.pop(key) for key in row.keys() - before.keys()}
        assert extra.pop("rollout/num_scored") == row["step"] * 12
        assert extra.pop("rollout/rounds") == 1
        assert extra == dict.fromkeys(
            ("rollout/tied_fraction", "rollout/replaced_fraction", "rollout/discarded_tokens"), 0
        )
    assert resampled == plain
    one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "resampled")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_reference_sees_the_batch_alone_and_rewards_are_known_before(choosy: WriteRecipe) -> None:
    loop = build_loop(load_recipe(choosy()), quiet=True)
    passes, asked = [], loop.learner.policy.ref_logprobs
    loop.learner.policy.ref_logprobs = lambda groups, **others: (passes.append(groups), asked(groups, **others))[1]
    metrics = loop.step(1)
    assert metrics["rollout/rounds"] > 1
    assert [len(groups.group_sizes) for groups in passes] == [3]
    parts = sum(value for key, value in metrics.items() if key.startswith("time/"))
    assert parts <= metrics["step_time"]


def test_a_stopped_run_goes_on_with_the_same_bytes(choosy: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = choosy(checkpoint={"every": 1, "keep": 4}), tmp_path / "run"
    rows = train(recipe)
    weights = (run / "model" / "model.safetensors").read_bytes()
    states = [json.loads((run / "checkpoints" / f"step-{step}" / "state.json").read_text()) for step in range(1, 5)]
    assert [state["replaced"] for state in states] == [round(12 * row["epoch"]) - 3 * row["step"] for row in rows]
    assert states[0]["replaced"] > 0
    for step in 1, 2, 3:
        shutil.rmtree(run / "model")
        for later in range(step + 1, 5):
            shutil.rmtree(run / "checkpoints" / f"step-{later}")
        assert train(recipe, resume=True) == rows
        assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_prompts_of_a_step_that_failed_are_drawn_again(choosy: WriteRecipe, tmp_path: Path) -> None:
    recipe = choosy(checkpoint={"every": 0})
    whole = train(recipe, f"output_dir={tmp_path / 'whole'}")
    loop = build_loop(load_recipe(recipe), quiet=True)
    learn = loop.learner.learn

    def fails(step: int, *arguments: Any, **others: Any) -> Any:
        if step == 3:
            raise RolloutError("the trainer and the sampler do not agree")
        return learn(step, *arguments, **others)

    loop.learner.learn = fails
    with pytest.raises(RolloutError, match="do not agree"):
        run_loop(loop, resume=False, command="test")
    assert train(recipe, resume=True) == whole


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_fill_a_batch_as_one_process_does(choosy: WriteRecipe, tmp_path: Path, sharding: str) -> None:
    recipe = choosy(checkpoint={"every": 2, "keep": 9})
    alone = train(recipe, f"output_dir={tmp_path / 'alone'}")
    command = ("-m", "dar", "train", str(recipe), "output_dir=two", f"runtime.sharding={sharding}", "--quiet")
    ranks = on_ranks(*command, cwd=tmp_path, num_ranks=2)
    assert ranks.returncode == 0, ranks.stdout.decode()
    together = metrics_of(tmp_path / "two")
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        exact = [key for key in one if ("rollout/" in key and "gap" not in key) or key in ("reward", "epoch")]
        assert [other[key] for key in exact] == [one[key] for key in exact]
    for step in range(1, 5):
        files = (tmp_path / folder / "completions" / f"step-{step}.parquet" for folder in ("alone", "two"))
        one, other = (pd.read_parquet(file, columns=["position", "completion", "reward"]) for file in files)
        pd.testing.assert_frame_equal(one, other)
    # One process goes on with what two have saved.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-4")
    on = train(recipe, f"output_dir={tmp_path / 'two'}", f"runtime.sharding={sharding}", resume=True)
    for one, other in zip(alone, on, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_ranks_fail_together_in_a_later_round(choosy: WriteRecipe, tmp_path: Path) -> None:
    recipe = choosy(checkpoint={"every": 0})
    # All else is tied, so rounds go on until one of the ranks is given that word.
    (tmp_path / "choosy.py").write_text(
        "def choosy(name, completions):\n"
        "    if 'b' in name:\n"
        "        raise ValueError('no word begins with it')\n"
        "    return [0.0] * len(name)\n"
    )
    command = ("-m", "dar", "train", str(recipe), "output_dir=two", "--quiet")
    ranks = on_ranks(*command, cwd=tmp_path, num_ranks=2)
    said = ranks.stdout.decode()
    assert ranks.returncode != 0
    assert said.count("no word begins with it") == 1, said


def test_images_are_sampled_again_too(tmp_path: Path) -> None:
    settings = flow_recipe(tmp_path / "flow") | {
        "algorithm": "flow_grpo", "rewards": ["x:of_one"], "prompts_per_step": 3, "num_generations": 2,
        "output_dir": str(tmp_path / "run"), "sampling": {"resample_tied": {"max_rounds": 2}},
        "runtime": {"device": "cpu", "precision": "fp32"},
    }  # fmt: skip

    def of_one(images: Tensor, prompts: list[str]) -> list[float]:
        bright = images.flatten(1).mean(1).tolist()
        return [0.0 if prompt == "1" else value for prompt, value in zip(prompts, bright, strict=True)]

    objects = Objects(train_rows=LABELS, rewards={"of_one": of_one})
    loop = build_loop(make_spec(**settings), objects, quiet=True)
    rollouts, known = loop.collector.collect(1, 0, 3, phase=loop._phase)
    assert [prompt.content for prompt in rollouts.prompts].count("1") == 0
    assert rollouts.images is not None
    assert rollouts.images.flatten(1).mean(1).tolist() == pytest.approx(known.finish().total.flatten().tolist())
    assert known.finish().reported["rollout/rounds"] > 1


def test_a_plan_that_takes_a_step_shows_the_batchs_first_prompt(choosy: WriteRecipe) -> None:
    spec = load_recipe(choosy())
    spec = spec.model_copy(update={"seed": next(seed for seed in range(99) if first_word(spec, seed) in "acegik")})
    trial = try_step(spec, num_heldout_prompts=0)
    assert len(trial.completions) == 4
    assert trial.prompt[4] not in "acegik"


def first_word(spec: Any, seed: int) -> str:
    loop = build_loop(spec.model_copy(update={"seed": seed}), quiet=True)
    return str(loop.collector.stream.at(0)[0].columns["name"])


# --- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sampling": {"resample_tied": {"max_rounds": 0}}}, "max_rounds"),
        ({"sampling": {"resample_tied": {}}}, "max_rounds"),
        (
            {"num_generations": 1, "sampling": {"resample_tied": {"max_rounds": 1}}},
            "num_generations is 1: sampling.res",
        ),
        (
            {"sampling": {"resample_tied": {"max_rounds": 1}, "max_staleness": 1}, "engine": "vllm"},
            "resample_tied draws prompts when a step's rewards are known, max_staleness has later steps' drawn before",
        ),
        (
            {"algorithm": "dpo", "sampling": {"resample_tied": {"max_rounds": 1}}},
            "dpo learns from the data's completions: sampling.mask_truncated, correction, max_staleness and resample_t",
        ),
    ],
)
def test_recipes_that_could_not_resample_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_spec(**keys)
