"""Sampling ahead of learning: which weights sampled what, what is learned from it, and what a checkpoint keeps."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.engines import ThreadedEngine
from support.handmade import plain_logprobs
from support.ranks import on_ranks
from torch import Tensor

from dar.assembly.loop import build_loop
from dar.assembly.plan import make_plan
from dar.batch import Weighted
from dar.config.recipe import load_recipe
from dar.errors import ConfigError, RewardError, RolloutError
from dar.ops import masked_sum
from dar.trainer import run_loop

UNREPEATABLE = ("time/", "step_time", "memory/", "eval/time", "rollout/sampler_idle")
OWN_WEIGHTS = ["engine.type=support.engines:ThreadedEngine", "engine.delay=0.05"]
REWARDS = [{"type": "regex", "pattern": "^[!-~]"}]
WriteRecipe = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    ThreadedEngine.asked.clear()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)} for row in rows]


def train(recipe: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    spec = load_recipe(recipe, [*OWN_WEIGHTS, *overrides])
    run_loop(build_loop(spec, resume=resume, quiet=True, allow_changed_recipe=resume), resume=resume, command="test")
    return rows_of(Path(spec.output_dir))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def evaluated(tmp_path: Path) -> dict[str, Any]:
    """A recipe's keys for a held-out evaluation after every step, between what is on its way."""
    prompts = str(tmp_path / "prompts.jsonl")
    return {
        "data": {"train": prompts, "heldout": prompts},
        "evaluation": {"every": 1, "max_prompts": 1},
        "optim": {"learning_rate": 1e-2},
    }


def test_an_engine_with_weights_of_its_own_changes_nothing(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(**evaluated(tmp_path))
    spec = load_recipe(recipe, [f"output_dir={tmp_path / 'here'}"])
    run_loop(build_loop(spec, quiet=True), resume=False, command="test")
    here = rows_of(tmp_path / "here")
    assert train(recipe, f"output_dir={tmp_path / 'there'}") == here
    assert [each for each in ThreadedEngine.asked if each[0] == "train"] == [
        ("train", step, step - 1) for step in (1, 2, 3)
    ]
    one, other = weights_of(tmp_path / "here"), weights_of(tmp_path / "there")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("lag", [1, 2])
def test_samples_are_so_many_steps_old_whoever_is_faster(write_recipe: WriteRecipe, tmp_path: Path, lag: int) -> None:
    recipe = write_recipe(**evaluated(tmp_path), steps=5)
    stale = f"sampling.max_staleness={lag}"
    rows = train(recipe, stale, f"output_dir={tmp_path / 'one'}")
    # Held-out completions are of the weights as they are, though what is on its way was asked for before.
    versions = [version for purpose, _, version in ThreadedEngine.asked if purpose == "heldout"]
    assert versions == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]  # to be measured, and to be read
    trained = {step: version for purpose, step, version in ThreadedEngine.asked if purpose == "train"}
    assert trained == {step: max(0, step - 1 - lag) for step in range(1, 6)}
    steps = [row for row in rows if "loss" in row]
    for row in steps:
        age = row["step"] - 1 - trained[row["step"]]
        assert row["rollout/staleness"] == row["rollout/staleness_max"] == age
        # Of samples of other weights neither is there anything to agree with, nor of own ones any distance.
        assert ("rollout/logprob_gap" in row) == (age == 0) != ("kl/stale" in row)
        assert age == 0 or (row["kl/stale_k3"] > 1e-3 and 0 < row["rollout/ess_fraction"] < 1)
    assert train(recipe, stale, "engine.delay=0", f"output_dir={tmp_path / 'other'}") == rows
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "other")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- what is learned -------------------------------------------------------------------------------------------------


def stale_run(
    recipe: Path, steps: int, *overrides: str
) -> tuple[list[Any], list[Weighted], dict[str, Tensor], dict[str, float]]:
    """Of so many steps the model before each, the batches, and the last one's gradient and metrics."""
    settings = ("optim.learning_rate=1e-2", "optim.max_grad_norm=1e9", "sampling.max_staleness=1", *overrides)
    loop = build_loop(load_recipe(recipe, [*OWN_WEIGHTS, *settings]), quiet=True)
    models, batches, gradients = [], list[Weighted](), dict[str, Tensor]()
    learn = loop.learner.learn

    def noted(step: int, weighted: Weighted, **others: Any) -> Any:
        batches.append(weighted)
        models.append(copy.deepcopy(loop.learner.policy.module.model))  # pyright: ignore[reportAttributeAccessIssue]
        return learn(step, weighted, **others)

    def note_gradients(*_: object) -> None:
        gradients.update(
            {name: parameter.grad.clone() for name, parameter in loop.trainable().items() if parameter.grad is not None}
        )

    loop.learner.learn = noted
    loop.optimizer.register_step_pre_hook(note_gradients)
    loop.begin()
    metrics = [loop.step(step) for step in range(1, steps + 1)]
    loop.end()
    return models, batches, gradients, metrics[-1]


@pytest.mark.parametrize("correction", ["none", "token", "sequence"])
def test_gradient_on_a_stale_batch_is_that_of_its_own_ratios(write_recipe: WriteRecipe, correction: str) -> None:
    """Without correction ρ = π_θ/π_b; with it ρ = π_θ/π_t = 1, times the constant min(π_t/π_b, cap)."""
    grpo = {"type": "grpo", "beta": 0.0, "clip_low": 0.2, "clip_high": 0.2}
    recipe = write_recipe(algorithm=grpo, rewards=REWARDS, num_generations=8)
    models, batches, gradients, metrics = stale_run(
        recipe, 3, f"sampling.correction={correction}", "sampling.correction_cap=1.1"
    )
    batch, mask = batches[2], batches[2].mask
    # The weights after one step sampled it; those after two learn.
    behaviour = plain_logprobs(models[1], batch.groups, 1.0).detach()
    torch.testing.assert_close(batch.old_logprobs, behaviour, rtol=1e-4, atol=1e-5)
    current = plain_logprobs(models[2].requires_grad_(), batch.groups, 1.0)
    log_ratio, advantages = current - behaviour, batch.advantages.unsqueeze(1)
    assert ((log_ratio.abs() > 0.25) & mask).any()
    if correction == "none":
        ratio = log_ratio.exp()
        losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    else:
        ratio = log_ratio if correction == "token" else masked_sum(log_ratio, mask).unsqueeze(1)
        losses = -ratio.detach().exp().clamp(max=1.1) * current * advantages
    ((losses * mask).sum(1) / mask.sum(1)).mean().backward()
    expected = {name: each.grad for name, each in models[2].named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=2e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2
    changed = masked_sum(log_ratio, mask)[batch.weights > 0].detach()
    assert metrics["kl/stale"] == pytest.approx(float(-changed.mean()), rel=1e-3, abs=1e-5)
    ratios = changed.exp()
    share = float(ratios.sum() ** 2 / (ratios**2).sum()) / len(ratios)
    assert metrics["rollout/ess_fraction"] == pytest.approx(share, rel=1e-3) != 1
    assert "rollout/logprob_gap" not in metrics


def test_weights_of_dar_are_of_what_sampled_the_batch(write_recipe: WriteRecipe) -> None:
    dar = {"type": "dar", "alpha": 0.5, "beta": 1.0}
    recipe = write_recipe(algorithm=dar, rewards=REWARDS, num_generations=8)
    models, batches, *_ = stale_run(recipe, 3)
    batch = batches[2]
    # π₀ is the model before any step, π_b that after one.
    ref, behaviour, current = (masked_sum(plain_logprobs(each, batch.groups, 1.0), batch.mask) for each in models)
    advantages = (batch.rewards - batch.rewards.mean(1, keepdim=True)).flatten()
    advantages = advantages / advantages.std(correction=0)
    expected = (0.5 * (ref - behaviour) + advantages).exp().clamp(max=20.0)
    torch.testing.assert_close(batch.weights, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(batch.weights, (0.5 * (ref - current) + advantages).exp().clamp(max=20.0), rtol=0.05)


# --- resuming and failing --------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bytes_with_what_was_on_its_way(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while the completions of its third step are scored, which belong to the checkpoint of the second."""
    (tmp_path / "failing_once.py").write_text(
        "calls = 0\n"
        "fails_at = 0\n"
        "def failing_once(completion_ids, **others):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == fails_at:\n"
        "        raise OSError('no answer')\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    failing_once: Any = importlib.import_module("failing_once")
    recipe = write_recipe(
        optim={"learning_rate": 1e-2},
        steps=5,
        rewards=["failing_once:failing_once"],
        checkpoint={"every": 0},
        num_generations=3,
    )
    stale = "sampling.max_staleness=2"
    whole = train(recipe, stale, f"output_dir={tmp_path / 'whole'}")
    failing_once.calls, failing_once.fails_at = 0, 3
    with pytest.raises(RewardError, match="no answer"):
        train(recipe, stale)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    ThreadedEngine.asked.clear()
    assert train(recipe, stale, resume=True) == whole
    # The completions of steps 3 and 4 were kept.
    assert [each[1:] for each in ThreadedEngine.asked] == [(5, 2)]
    one, other = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("change", ["sampling.max_staleness=1", "num_generations=2"])
def test_what_does_not_fit_the_recipe_any_more_is_sampled_anew(
    write_recipe: WriteRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    recipe = write_recipe(steps=4, checkpoint={"every": 2})
    train(recipe, "sampling.max_staleness=2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    ThreadedEngine.asked.clear()
    with caplog.at_level(logging.WARNING):
        train(recipe, "sampling.max_staleness=2", change, resume=True)
    assert "no completions of step 3 that fit" in caplog.text
    assert [each[1:] for each in ThreadedEngine.asked] == [(3, 2), (4, 2)]


def test_an_error_of_the_sampler_ends_the_step_that_needs_its_batch(
    write_recipe: WriteRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(steps=4, checkpoint={"every": 0})
    with pytest.raises(RolloutError, match=r"the completions of step 3, asked for ahead of it: the sampler ran out"):
        train(recipe, "sampling.max_staleness=2", "engine.fails_at=3")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    ThreadedEngine.asked.clear()
    assert train(recipe, "sampling.max_staleness=2", resume=True)[-1]["step"] == 4
    assert "no completions of step 3 that fit" in caplog.text
    # That of step 4 was sampled, and kept.
    assert [each[1:] for each in ThreadedEngine.asked] == [(3, 2)]


def test_ranks_sample_ahead_as_one_process_does_and_one_goes_on_with_what_they_kept(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    recipe = write_recipe(prompts_per_step=3, steps=3, checkpoint={"every": 2})
    stale = "sampling.max_staleness=1"
    alone = train(recipe, stale, f"output_dir={tmp_path / 'alone'}")
    command = ("-m", "dar", "train", str(recipe), "output_dir=two", *OWN_WEIGHTS, stale, "--quiet")
    ranks = on_ranks(*command, cwd=tmp_path, num_ranks=2)
    assert ranks.returncode == 0, ranks.stdout.decode()
    together = rows_of(tmp_path / "two")
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-3")
    ThreadedEngine.asked.clear()
    assert train(recipe, stale, f"output_dir={tmp_path / 'two'}", resume=True)[-1] == pytest.approx(
        together[-1], rel=1e-3, abs=1e-5
    )
    assert ThreadedEngine.asked == []


def test_an_engine_must_be_able_to_go_on_and_say_whose_samples_they_are(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "engine.type=dar.rollout.in_process.engine:InProcessEngine"
    spec = load_recipe(write_recipe(), [own, "engine.max_tokens=100", "sampling.max_staleness=1"])
    for check in make_plan, build_loop:
        with pytest.raises(ConfigError, match=r"dar\.\S+:InProcessEngine has no `submit`"):
            check(spec)
    sync = ThreadedEngine.sync
    monkeypatch.setattr(ThreadedEngine, "sync", lambda self, policy, version: sync(self, policy, version + 3))
    with pytest.raises(RolloutError, match=r"of step 1 may be of weights 0 to 0, but the engine says \[3\]"):
        train(write_recipe(), "sampling.max_staleness=1")
