"""The model card of a trained policy."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from dar.config.recipe import dump_recipe
from dar.config.reward_model import RewardModelSpec
from dar.config.rewards import reward_name
from dar.config.run import RunSpec
from dar.files.paths import hub_name
from dar.record.measures import MEASURES, evaluations
from dar.shown import fenced, markdown


def model_card(spec: RunSpec, metrics: list[dict[str, Any]], alerts: list[dict[str, Any]], *, command: str = "") -> str:
    """README.md of the model folder: what it was trained from, on, with, and what the held-out prompts say.

    Args:
        spec: the recipe.
        metrics: the lines of metrics.jsonl.
        alerts: the lines of alerts.jsonl.
        command: what was run, where that is known.
    """
    rewards = ", ".join(f"{markdown(reward_name(reward))} (weight {reward.weight:g})" for reward in spec.rewards)
    before, after = (found[0], found[-1]) if len(found := evaluations(metrics)) >= 2 else ({}, {})
    rows = [row for row in MEASURES if row.key in before and row.key in after]
    is_text = spec.model.library == "transformers"
    lines = [
        *front_matter(
            spec,
            library="peft" if spec.model.lora else spec.model.library,
            task="text-generation" if is_text else None,
            tags=["rlhf", spec.algorithm.type],
            results=[(row.key, row.name, before[row.key], after[row.key]) for row in rows],
        ),
        f"# {markdown(spec.model.path)}, aligned with {spec.algorithm.type.upper()}",
        "",
        f"Trained with `dar` for {metrics[-1]['step'] if metrics else 0} steps of {spec.prompts_per_step} prompts "
        + ("with their completions" if spec.algorithm.logged else f"× {spec.num_generations} completions")
        + f" from {markdown(spec.data.train.path)}"
        + (f"; π₀ is the teacher {markdown(spec.teacher.path)}" if spec.teacher else "")
        + (f"; reward: {rewards}." if rewards else "."),
        "",
    ]
    if rows:
        lines += [
            "| held-out prompts | before | after |",
            "|---|---:|---:|",
            *(f"| {row.name} | {row.shown(before[row.key])} | {row.shown(after[row.key])} |" for row in rows),
            "",
        ]
    if alerts:
        lines += ["Alerts during training:", ""]
        lines += [
            f"* step {alert['step']}, {alert['rule']} ({alert['action']}): {markdown(alert['message'])}"
            for alert in alerts
        ]
        lines += [""]
    elif spec.alerts:
        rules = ", ".join(dict.fromkeys(alert.type for alert in spec.alerts))
        lines += [f"No alert was raised during training; watched were: {rules}.", ""]
    if command:
        lines += [fenced(command, "sh"), ""]
    lines += [fenced(dump_recipe(spec), "yaml"), ""]
    return "\n".join(lines)


def front_matter(
    spec: RunSpec | RewardModelSpec,
    *,
    task: str | None,
    tags: list[str],
    results: Iterable[tuple[str, str, float, float]],
    library: str = "transformers",
) -> list[str]:
    """The lines a card begins with, by which the Hub files and shows it: YAML that holds just these values.

    A base model or data set is named only if it is one of the Hub, which takes no other. `results` are (key, name,
    before, after) of what held-out data said.
    """
    heldout, train = spec.data.heldout, _on_hub(spec.data.train.path)
    found = [
        EvalResult(
            task or "other", heldout.path, heldout.path, key, value, metric_name=label, dataset_split=heldout.split
        )
        for key, name, before, after in results
        for label, value in ((name, after), (f"{name}, before training", before))
        if heldout is not None
    ]
    fields = ModelCardData(
        library_name=library,
        base_model=_on_hub(spec.model.path),
        datasets=[train] if train else None,
        pipeline_tag=task,
        tags=tags,
        model_name=Path(spec.output_dir).name if found else None,
        eval_results=found or None,
    )
    return ["---", yaml.safe_dump(fields.to_dict(), sort_keys=False).rstrip(), "---", ""]


def _on_hub(path: str) -> str | None:
    with suppress(ValueError):
        return None if Path(path).exists() else hub_name(path)
