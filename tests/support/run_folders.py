"""Run folders written without training: metrics and completions of which every figure is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import torch

from dar.config.recipe import build_spec
from dar.config.recorded import RecordedSpec
from dar.config.reward_model import RewardModelSpec
from dar.record.completions import pngs
from dar.record.folder import RunFolder
from dar.reward_model.report import preference_report

WORDS = ("rain", "bread", "tea", "maps", "slow", "green", "paper", "stone", "river", "light")


def write_run(
    path: Path,
    *,
    steps: int = 6,
    evaluations: tuple[int, ...] = (0, 3, 6),
    completions_every: int = 2,
    num_prompts: int = 4,
    num_generations: int = 3,
    num_tokens: int = 5,
    seed: int = 0,
    gain: float = 1.0,
    gold: bool = False,
    text: str | None = None,
    sampled: bool = True,
    image: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """A run of `steps` steps whose held-out rewards rise by `gain`.

    Args:
        evaluations: steps after which the held-out prompts were sampled.
        num_prompts, num_generations, num_tokens: of every recorded file.
        gold: a gold reward falls while the reward rises.
        text: of every completion, instead of a few words.
        image: (channels, height, width) of the images that the completions are; every one has another color.
        sampled: False for a method that learns from data, which records no rewards.
        changes: of the recipe.
    """
    random, folder = Random(seed), RunFolder(path)
    recipe: dict[str, Any] = {
        "model": "some/model",
        "data": "prompts.jsonl",
        "rewards": ["sentiment"],
        "steps": 6,
        "seed": seed,
        "output_dir": str(path),
    }
    folder.start(build_spec(recipe | changes, where="recipe.yaml"), {"python": "3.11", "device": "cpu"})
    for step in range(steps + 1):
        if step:
            folder.append_metrics({"step": step, **training_metrics(step, random, sampled=sampled)})
            if completions_every and step % completions_every == 0:
                columns = completion_table(random, num_prompts, num_generations, num_tokens, text, reward=step / 10)
                count = num_prompts * num_generations
                columns |= image_column(count, image)
                columns |= {"advantage": [random.gauss(0, 1) for _ in range(count)]}
                columns |= {"weight": [random.choice((0.0, 0.2, 1.0, 20.0)) for _ in range(count)]}
                folder.write_completions(f"step-{step}", columns)
        if step in evaluations:
            level = gain * step / steps
            columns = completion_table(Random(seed), num_prompts, num_generations, num_tokens, text, reward=level)
            columns |= image_column(num_prompts * num_generations, image)
            if gold:
                columns["gold"] = [0.5 - value for value in columns["reward"]]
            folder.write_completions(f"heldout-step-{step}", columns)
            folder.append_metrics({"step": step, **heldout_metrics(columns, step)})
    return path


def recorded_run(path: Path, spec: RecordedSpec) -> Path:
    """The same run, as another trainer's that a callback has recorded."""
    RunFolder(write_run(path)).record_recipe(spec)
    return path


def training_metrics(step: int, random: Random, *, sampled: bool) -> dict[str, float]:
    """What a step records, few of the keys and all kinds."""
    common = {
        "loss": random.random(),
        "tokens/prompt": 40,
        "tokens/completion": 100 + step,
        "memory/peak_gb": 1.0 + step / 100,
        "time/update": 2.0 + random.random(),
        "step_time": 7.0,
    }
    if not sampled:
        return common
    return common | {
        "reward": step / 10 + random.random() / 100,
        "kl/ref": 0.3 * step,
        "kl/old_k3": 0.01 * random.random(),
        "completions/mean_length": 20.0 + step,
        "completions/clipped_ratio": 0.05 * step,
        "completions/distinct_2": 0.8,
        "entropy": 2.0 - 0.1 * step,
        "weights/ess_fraction": 0.5,
        "weights/clip_fraction": 0.1,
        "weights/zero_fraction": 0.2,
        "weights/log_w_reg_mean": -0.1 * step,
        "time/rollout": 3.0,
    }


def completion_table(
    random: Random, num_prompts: int, num_generations: int, num_tokens: int, text: str | None, *, reward: float
) -> dict[str, Any]:
    """Rows as the trainer records them. Completion k of prompt p has the reward `reward` + p/100 + k/1000."""
    rows = [(prompt, k) for prompt in range(num_prompts) for k in range(num_generations)]
    tokens = [[f" {random.choice(WORDS)}" for _ in range(num_tokens - 1)] + ["<eos>"] for _ in rows]
    logprobs = [[-random.random() for _ in range(num_tokens)] for _ in rows]
    ref_logprobs = [[-random.random() for _ in range(num_tokens)] for _ in rows]
    rewards = [reward + prompt / 100 + k / 1000 for prompt, k in rows]
    return {
        "position": [prompt for prompt, _ in rows],
        "prompt": [f"Write about {WORDS[prompt % 10]}, number {prompt}." for prompt, _ in rows],
        "completion": [text or "".join(row[:-1]).strip() for row in tokens],
        "length": [num_tokens] * len(rows),
        "finish_reason": ["length" if k == 0 else "eos" for _, k in rows],
        "reward": rewards,
        "reward/first": [value / 2 for value in rewards],
        "reward/second": [value / 2 for value in rewards],
        "kl_ref": [sum(new) - sum(old) for new, old in zip(logprobs, ref_logprobs, strict=True)],
        "tokens": tokens,
        "logprobs": pa.array(logprobs, type=pa.list_(pa.float32())),
        "ref_logprobs": pa.array(ref_logprobs, type=pa.list_(pa.float32())),
    }


def image_column(count: int, shape: Sequence[int] | None) -> dict[str, Any]:
    """As many images, from black to white."""
    if shape is None:
        return {}
    return {"image": pngs(torch.linspace(-1, 1, count).view(-1, 1, 1, 1).expand(-1, *shape))}


def heldout_metrics(columns: dict[str, Any], step: int) -> dict[str, float]:
    """The evaluation's line: means of the very completions of its table, and a KL of half a nat a step."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = {
        "eval/reward": mean(columns["reward"]),
        "eval/rewards/first/mean": mean(columns["reward/first"]),
        "eval/rewards/second/mean": mean(columns["reward/second"]),
        "eval/kl/ref": 0.5 * step,
        "eval/completions/mean_length": mean(columns["length"]),
        "eval/completions/clipped_ratio": mean([float(reason == "length") for reason in columns["finish_reason"]]),
        "eval/entropy": 2.0 - 0.1 * step,
        "eval/time": 4.0,
    }
    return found | ({"eval/gold": mean(columns["gold"])} if "gold" in columns else {})


def add_alert(path: Path, **alert: Any) -> None:
    """A line of alerts.jsonl."""
    row = {"step": 3, "rule": "kl", "metric": "kl/ref", "value": 9.0, "threshold": 8.0, "message": "KL is 9"}
    row |= {"action": "mark"} | alert
    with (path / "alerts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def write_reward_model_run(path: Path) -> Path:
    """A reward model's training of four steps; of four held-out pairs it is then right on two."""
    folder = RunFolder(path)
    recipe = {"model": "some/model", "data": "pairs.jsonl", "steps": 4, "output_dir": str(path)}
    spec = build_spec(recipe, where="recipe.yaml", kind=RewardModelSpec)
    folder.start(spec, {"device": "cpu"})
    longer_by = [3, 30, -5, 0]
    reports = {
        "before": preference_report([0.0] * 4, [0.0] * 4, longer_by),
        "after": preference_report([1.0, 2.0, -1.0, 0.0], [0.0] * 4, longer_by),
    }
    for step in range(5):
        if step:
            loss = 0.7 - 0.1 * step
            folder.append_metrics({"step": step, "loss": loss, "accuracy": 0.2 * step, "margin": 0.5, "step_time": 2.0})
        if step in (0, 4):
            when = "after" if step else "before"
            folder.write_evaluation({**folder.evaluation(), when: reports[when]})
            keys = ("loss", "accuracy", "ece", "mean_margin")
            folder.append_metrics({"step": step, **{f"eval/{key}": reports[when][key] for key in keys}})
    folder.model.mkdir()
    return path
