"""Every method on a tiny model: it learns, micro-batches do not matter, a stopped run continues to the same bytes."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from support.flows import FLOW_METHODS, ROWS, flow_recipe
from support.handmade import make_spec
from torch import Tensor

from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.batch import Batch, Weighted
from dar.config.algorithms import ALGORITHM_SPECS
from dar.learn.update import SAMPLER_LOGPROBS
from dar.run.loop import Loop
from dar.run.stopping import Control
from dar.trainer import run_loop

ONLINE = [name for name, spec in ALGORITHM_SPECS.items() if not spec.logged]
PREFERENCES = ["dpo", "ipo", "slic", "chi_po"]
PROMPTS = [{"prompt": [{"role": "user", "content": f"say {word}"}]} for word in ("a", "bee", "sea", "dee", "eh")]
LOGGED: dict[str, dict[str, Any]] = {
    "sft": {"completion": "yes"},
    "var": {"completions": ["yes", "nope", "maybe"], "rewards": [1.0, 0.0, 0.5]},
    "qrpo": {"completions": ["yes", "nope", "maybe"], "rewards": [1.0, 0.0, 0.5], "ref_rewards": [0.0, 0.5, 0.5, 1.0]},
    **{name: {"chosen": "yes", "rejected": "nope"} for name in PREFERENCES},
    "trace": {"chosen": "yes", "rejected": "nope"},
}
# Verdicts on chosen and rejected, row by row: two pairs to invert, one to punish, two to retain.
VERDICTS = [(False, True), (False, False), (True, False), (True, True), (False, True)]


def make_loop(
    folder: Path, algorithm: str | dict[str, Any], *, resume: bool = False, callbacks: tuple[Any, ...] = (), **keys: Any
) -> Loop:
    """A small run of a method, on rows as it needs them."""
    name = algorithm if isinstance(algorithm, str) else algorithm["type"]
    length: list[Any] = [{"type": "length", "target": 3}]
    if name == "maxrl":  # 1 for two to four tokens, else 0
        length[0]["threshold"] = -0.5
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "rewards": [] if name in LOGGED else length,
        "sampling": {"max_completion_length": 8},
        "optim": {"learning_rate": 1e-2},
        "prompts_per_step": 4,
        "num_generations": 4,
        "steps": 12,
        # Its first batch has completions of several lengths, so of several rewards: one in a hundred tokens ends one.
        "seed": 8,
        "output_dir": str(folder),
        "checkpoint": {"every": 0},
        "logging": {"old_kl_prompts": 0, "completions_every": 0},
        "runtime": {"device": "cpu", "precision": "fp32"},
    }
    rows = [{**prompt, **LOGGED.get(name, {})} for prompt in PROMPTS]
    if name == "a_star_po":
        rows = [{**prompt, "ref_rewards": [-5.0, -4.0 + index]} for index, prompt in enumerate(PROMPTS)]
    if name == "trace":
        columns = ("chosen_complies", "rejected_complies")
        rows = [{**row, **dict(zip(columns, each, strict=True))} for row, each in zip(rows, VERDICTS, strict=True)]
    objects = Objects(model=make_model(), tokenizer=make_tokenizer(), train_rows=rows, callbacks=callbacks)
    if name in FLOW_METHODS or name.startswith("flow:"):
        method = algorithm.removeprefix("flow:") if isinstance(algorithm, str) else algorithm
        settings |= flow_recipe(folder.parent / "flow") | {"algorithm": method}
        objects = Objects(train_rows=ROWS, callbacks=callbacks)
    return build_loop(make_spec(**settings | keys), objects, resume=resume, quiet=True)


# --- learning --------------------------------------------------------------------------------------------------------

# Methods learn the length within a dozen steps of Adam at 1e-2; these need another setting to show it as soon.
PATIENT: dict[str, dict[str, Any]] = {
    # One such step of Adam changes ratios by more than the variance of .04 allows, so the penalty would grow at once.
    "r2vpo": {"algorithm": {"type": "r2vpo", "max_variance": 1.0, "penalty": 0.25}},
}


def mean_of(rows: list[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


@pytest.mark.parametrize("name", ONLINE)
def test_reward_rises(tmp_path: Path, name: str):
    # With groups of 4 most are tied at first, and when the learning starts is a matter of the seed.
    loop = make_loop(tmp_path / "run", **{"algorithm": name, "num_generations": 16, **PATIENT.get(name, {})})
    rows = [loop.step(step) for step in range(1, loop.spec.steps + 1)]
    assert mean_of(rows[-3:], "reward") > mean_of(rows[:3], "reward") + (0.1 if name in FLOW_METHODS else 0.5)


@pytest.mark.parametrize("name", PREFERENCES)
def test_margins_rise(tmp_path: Path, name: str):
    # Small enough a step that IPO, whose margin is to be β/(2β) = ½, and the hinge, satisfied at 1, do not overshoot.
    loop = make_loop(tmp_path / "run", name, optim={"learning_rate": 5e-4})
    rows = [loop.step(step) for step in range(1, 9)]
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert all(one["rewards/margins"] < other["rewards/margins"] for one, other in pairwise(rows[:5]))
    assert rows[-1]["rewards/accuracies"] == 1.0


def test_sft_learns_its_demonstrations(tmp_path: Path):
    loop = make_loop(tmp_path / "run", "sft")
    rows = [loop.step(step) for step in range(1, 13)]
    assert rows[0]["loss"] > 5
    # The four tokens of "yes" and its end are known by heart.
    assert rows[-1]["loss"] < 0.2


def test_var_learns_the_better_completions_more(tmp_path: Path):
    loop = make_loop(tmp_path / "run", {"type": "var", "temperature": 0.5})
    scored = collected(loop)
    before = loop.learner.policy.logprobs(scored.groups, max_tokens=4096).sum(1)
    rows = [loop.step(step) for step in range(1, 7)]
    after = loop.learner.policy.logprobs(scored.groups, max_tokens=4096).sum(1)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    best, worst = ((after - before).reshape(4, 3)[:, column].mean() for column in (0, 1))
    assert best > worst + 5


# --- micro-batches ---------------------------------------------------------------------------------------------------


def collected(loop: Loop) -> Batch:
    """The first step's completions with all a method may read."""
    rollouts, pending = loop.collector.collect(1, 0, loop.spec.prompts_per_step, phase=loop._phase)
    ref_logprobs = values = None
    if loop.algorithm.needs_reference:
        ref_logprobs = loop.learner.policy.ref_logprobs(rollouts.groups, max_tokens=4096)
    if loop.algorithm.needs_values:
        values = loop.learner.policy.values(rollouts.groups, max_tokens=4096)
    rewards = pending.finish()
    return rollouts.scored(rewards.total, rewards.parts, ref_logprobs=ref_logprobs, values=values)


def gradients(loop: Loop) -> list[Tensor]:
    """Every gradient that the loop's optimizer will step along, as one vector each; filled while it runs."""
    found: list[Tensor] = []
    step = loop.learner.updater.optimizer.step

    def capture(*arguments: Any) -> Any:
        parts = [p.grad.flatten() for p in loop.learner.updater.parameters if p.grad is not None]
        found.append(torch.cat(parts).clone())
        return step(*arguments)

    loop.learner.updater.optimizer.step = capture  # pyright: ignore[reportAttributeAccessIssue]
    return found


def weights_of(loop: Loop) -> Tensor:
    return torch.cat([p.detach().flatten() for p in loop.learner.policy.trainable().values()])


def assert_near(one: Tensor, other: Tensor, *, share: float) -> None:
    """The difference is small against the vector, which is not 0."""
    assert other.norm() > 0
    assert (one - other).norm() < share * other.norm()


# ε = 1 makes Adam's first steps smooth in the gradient: with its default the sign of a gradient that is 0 but for
# rounding would decide about a whole step.
SMOOTH = {"learning_rate": 0.1, "eps": 1.0, "max_grad_norm": 1e9}
BRANCHES = [
    *ALGORITHM_SPECS,
    {"type": "dao", "ratio_level": "token"},
    {"type": "grpo", "updates": 2},
    {"type": "lco", "loss": "mse"},
    {"type": "ppo", "critic": "model"},
    {"type": "dar", "beta": {"target_ess": 0.5}},
    *(f"flow:{name}" for name in ("dar", "rloo", "gspo", "online_dpo")),
]
OF_TOKENS = [each for each in BRANCHES if each not in FLOW_METHODS and not str(each).startswith("flow:")]


@pytest.mark.parametrize("algorithm", BRANCHES, ids=str)
def test_microbatches_change_nothing_but_rounding(tmp_path: Path, algorithm: Any):
    found, changes, losses = [], [], []
    for size in (100_000, 1):
        runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 0.0, "max_tokens_per_microbatch": size}
        loop = make_loop(tmp_path / str(size), algorithm, optim=SMOOTH, runtime=runtime)
        before, grads = weights_of(loop), gradients(loop)
        losses.append(loop.step(1)["loss"])
        found.append(grads)
        changes.append(weights_of(loop) - before)
    assert len(found[0]) == len(found[1]) == loop.algorithm.updates
    for whole, parts in zip(*found, strict=True):
        assert_near(parts, whole, share=1e-4)
    assert_near(changes[1], changes[0], share=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)


# --- resuming --------------------------------------------------------------------------------------------------------


class StopAfter:
    """Asks the run to stop as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_metrics(self, step: int, metrics: Mapping[str, float], control: Control) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Metrics that can be repeated, and the weights of the newest checkpoint and of the saved model."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: value for key, value in line.items() if not key.startswith(("time/", "step_time", "memory/"))}
        for line in lines
    ]
    (shard,) = (folder / "checkpoints" / "step-4").glob("shard-*")
    checkpoint = load_file(shard)
    (saved,) = (folder / "model").glob("*model.safetensors")
    model = load_file(saved)
    return metrics, {**checkpoint, **{f"model/{name}": tensor for name, tensor in model.items()}}


RESUMED: dict[str, dict[str, Any]] = {
    "ppo with a head": {"algorithm": {"type": "ppo", "critic": "head", "updates": 2}},
    "ppo with a critic model": {"algorithm": {"type": "ppo", "critic": "model", "updates": 2}},
    "r2vpo with replay": {"algorithm": {"type": "r2vpo", "replay": 2}},
    "dar with a target": {"algorithm": {"type": "dar", "beta": {"target_kl": 0.3}}},
    "null space": {"algorithm": {"type": "dar"}, "null_space": {"threshold": 1e-2, "layers": "all"}},
    "reference that follows": {"algorithm": {"type": "grpo"}, "reference_sync": {"every": 1, "mix": 0.5}},
    "bapo": {"algorithm": {"type": "bapo", "updates": 2}},
    "a_star_po": {"algorithm": {"type": "a_star_po", "beta": 0.1}},
    "offline": {"algorithm": {"type": "dpo"}},
    "trace": {"algorithm": {"type": "trace"}},
    "flow": {"algorithm": {"type": "grpo_guard", "beta": 0.1}, "reference_sync": {"every": 1, "mix": 0.5}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_run_continues_to_the_same_bytes(tmp_path: Path, case: str):
    keys = dict(RESUMED[case])
    optim: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1}
    if "null_space" in keys:
        (tmp_path / "general.jsonl").write_text('{"prompt": "the cat"}\n')
        optim["null_space"] = {"data": str(tmp_path / "general.jsonl"), **keys.pop("null_space")}
    keys |= {"optim": optim, "steps": 4}

    def run(name: str, *, resume: bool = False, callbacks: tuple[Any, ...] = ()) -> int:
        loop = make_loop(tmp_path / name, resume=resume, callbacks=callbacks, **keys)
        return run_loop(loop, resume=resume, command="test").steps

    assert run("whole") == 4
    assert run("stopped", callbacks=(StopAfter(2),)) == 2
    assert run("stopped", resume=True) == 4
    (metrics, weights), (expected, expected_weights) = outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")
    assert metrics == expected
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name


# --- sampling.mask_truncated and sampling.correction -----------------------------------------------------------------


def test_truncated_completions_are_left_out_of_the_loss_only(tmp_path: Path):
    plain = make_loop(tmp_path / "plain", "dar")
    scored = collected(plain)
    weighted, _ = plain.algorithm.weigh(scored)
    has_eos = scored.has_eos
    assert has_eos.any()
    assert not has_eos.all()

    loop = make_loop(
        tmp_path / "masked",
        "dar",
        sampling={"max_completion_length": 8, "mask_truncated": True},
        runtime={"device": "cpu", "precision": "fp32", "negligible_share": 0.0},
    )
    trained: list[Weighted] = []
    update = loop.learner.updater.step

    def spy(algorithm: Any, batch: Weighted, **others: Any) -> Any:
        trained.append(batch)
        return update(algorithm, batch, **others)

    loop.learner.updater.step = spy
    metrics = loop.step(1)
    # Weights and advantages are those of the whole batch, and so is the denominator.
    kept = has_eos & (weighted.weights > 0)
    assert torch.equal(trained[0].weights, weighted.weights[kept])
    assert torch.equal(trained[0].advantages, weighted.advantages[kept])
    assert trained[0].denominator == weighted.denominator == 16.0
    assert metrics["rows/skipped_fraction"] == pytest.approx(1 - float(kept.float().mean()))


@pytest.mark.parametrize("name", [name for name in ONLINE if name[:7] != "online_" and name not in FLOW_METHODS])
def test_batch_of_truncated_completions_moves_nothing(tmp_path: Path, name: str):
    # One token, and it is not EOS: the reward would be learnt from otherwise.
    sampling = {"max_completion_length": 1, "mask_truncated": True}
    loop = make_loop(tmp_path / "run", name, sampling=sampling, rewards=[{"type": "regex", "pattern": "[a-z]"}])
    before = weights_of(loop)
    metrics = loop.step(1)
    assert metrics["rows/skipped_fraction"] == 1.0
    assert metrics["grad_norm"] == 0.0
    assert torch.equal(weights_of(loop), before)


@pytest.mark.parametrize("correction", ["token", "sequence"])
@pytest.mark.parametrize("name", ["dar", "grpo", "ppo"])
def test_correction_does_nothing_where_sampler_and_trainer_agree(tmp_path: Path, name: str, correction: str):
    found = []
    for setting in ("none", correction):
        sampling = {"max_completion_length": 8, "correction": setting}
        loop = make_loop(tmp_path / setting, name, sampling=sampling, optim=SMOOTH)
        grads = gradients(loop)
        loop.step(1)
        found.append(grads)
    for plain, corrected in zip(*found, strict=True):
        assert_near(corrected, plain, share=1e-4)


@pytest.mark.parametrize("cap", [1.2, 100.0])
@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_correction_scales_gradients_by_the_capped_ratio_to_the_sampler(tmp_path: Path, correction: str, cap: float):
    """DAR's gradient is −w/B on every token's log-probability; with a correction, times min(π_t/π_sampler, cap)."""
    sampling = {"max_completion_length": 8, "correction": correction, "correction_cap": cap}
    loop = make_loop(tmp_path / "run", {"type": "dar", "beta": 1.0}, sampling=sampling, optim=SMOOTH)
    scored = collected(loop)
    groups = scored.groups
    weighted, _ = loop.algorithm.weigh(scored)
    generator = torch.Generator().manual_seed(0)
    # log π_t − log π_sampler of each token; garbage in the padding.
    gap = 0.3 * torch.randn(groups.mask.shape, generator=generator)
    sampler = (weighted.old_logprobs - gap).masked_fill(~groups.mask, math.nan)

    exponent = gap.masked_fill(~groups.mask, 0.0)
    if correction == "sequence":
        exponent = exponent.sum(1, keepdim=True).expand_as(gap)
    factor = exponent.exp().clamp(max=cap)
    assert (factor[groups.mask] == cap).any() == (cap == 1.2)
    logprobs = loop.learner.policy.trained(groups).logprobs
    loss = -(weighted.weights.unsqueeze(1) * factor * logprobs).sum() / weighted.denominator
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, loop.learner.updater.parameters)])

    grads = gradients(loop)
    batch = replace(weighted, tokens={SAMPLER_LOGPROBS: sampler})
    result = loop.learner.updater.step(loop.algorithm, batch, on_policy=True, where="here")
    assert_near(grads[0], expected, share=1e-4)
    # Values stay what they were: only the gradient is scaled.
    plain = -(weighted.weights.unsqueeze(1) * logprobs.detach()).sum() / weighted.denominator
    assert result.loss == pytest.approx(float(plain), rel=1e-5)
    torch.testing.assert_close(result.logprobs, logprobs.detach(), rtol=0, atol=1e-5)


def test_rows_without_a_sampler_are_not_corrected(tmp_path: Path):
    sampling = {"max_completion_length": 8, "correction": "token"}
    found = []
    settings: dict[str, dict[str, Any]] = {"corrected": {"sampling": sampling}, "plain": {}}
    for name, keys in settings.items():
        loop = make_loop(tmp_path / name, "dar", optim=SMOOTH, **keys)
        weighted, _ = loop.algorithm.weigh(collected(loop))
        grads = gradients(loop)
        loop.learner.updater.step(loop.algorithm, weighted, on_policy=False, where="here")
        found.append(grads[0])
    assert torch.equal(found[0], found[1])


# --- what leaving rows out and a moving reference must not break -----------------------------------------------------


@pytest.mark.parametrize("name", ["online_dpo", "dpo"])
def test_pairs_are_not_torn_apart_by_leaving_light_rows_out(tmp_path: Path, name: str):
    """The shorter completion of a pair may be negligible by its length; its loss is not without the other."""
    runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 0.3}
    loop = make_loop(tmp_path / "run", name, runtime=runtime)
    trained: list[Weighted] = []
    update = loop.learner.updater.step

    def spy(algorithm: Any, batch: Weighted, **others: Any) -> Any:
        trained.append(batch)
        return update(algorithm, batch, **others)

    loop.learner.updater.step = spy
    metrics = loop.step(1)
    row = 0
    for size in trained[0].groups.group_sizes:
        assert float(trained[0].advantages[row : row + size].sum()) == 0.0
        row += size
    # Every pair is as likely under the policy as under π₀.
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_correction_reaches_methods_on_logits(tmp_path: Path, correction: str):
    """A sampler that gave every token e^½ less probability, capped at 1.25: 1.25 times the gradient."""
    sampling = {"max_completion_length": 8, "correction": correction, "correction_cap": 1.25}
    loop = make_loop(tmp_path / "run", {"type": "lco", "loss": "mse"}, sampling=sampling, optim=SMOOTH)
    weighted, _ = loop.algorithm.weigh(collected(loop))
    outputs = loop.learner.policy.trained(weighted.groups, with_logits=True)
    loss = loop.algorithm.terms(outputs, weighted).losses.sum() / weighted.denominator
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, loop.learner.updater.parameters)])
    grads = gradients(loop)
    batch = replace(weighted, tokens={SAMPLER_LOGPROBS: weighted.old_logprobs - 0.5})
    loop.learner.updater.step(loop.algorithm, batch, on_policy=True, where="here")
    assert_near(grads[0], 1.25 * plain, share=1e-4)
