"""The model card of a trained policy."""

from __future__ import annotations

from typing import Any

import yaml

from dar.config.recipe import dump_recipe
from dar.config.rewards import reward_name
from dar.config.run import RunSpec
from dar.shown import fenced, markdown

_ROWS = (
    ("reward", "eval/reward"),
    ("held-out reward, never trained on", "eval/gold"),
    ("KL to the initial model, nats per completion", "eval/kl/ref"),
    ("length, tokens", "eval/completions/mean_length"),
    ("share cut off before EOS", "eval/completions/clipped_ratio"),
    ("distinct-2", "eval/completions/distinct_2"),
)


def model_card(spec: RunSpec, metrics: list[dict[str, Any]], alerts: list[dict[str, Any]], *, command: str = "") -> str:
    """README.md of the model folder: what it was trained from, on, with, and what the held-out prompts say.

    Args:
        spec: the recipe.
        metrics: the lines of metrics.jsonl.
        alerts: the lines of alerts.jsonl.
        command: what was run, where that is known.
    """
    rewards = ", ".join(f"{markdown(reward_name(reward))} (weight {reward.weight:g})" for reward in spec.rewards)
    lines = [
        *front_matter(base_model=spec.model.path, tags=["rlhf", spec.algorithm.type]),
        f"# {markdown(spec.model.path)}, aligned with {spec.algorithm.type.upper()}",
        "",
        f"Trained with `dar` for {metrics[-1]['step'] if metrics else 0} steps of {spec.prompts_per_step} prompts "
        + ("with their completions" if spec.algorithm.logged else f"× {spec.num_generations} completions")
        + f" from {markdown(spec.data.train.path)}"
        + (f"; reward: {rewards}." if rewards else "."),
        "",
    ]
    evaluations = [row for row in metrics if "eval/reward" in row]
    if len(evaluations) >= 2:
        before, after = evaluations[0], evaluations[-1]
        lines += [
            "| held-out prompts | before | after |",
            "|---|---:|---:|",
            *(f"| {label} | {before[key]:.3f} | {after[key]:.3f} |" for label, key in _ROWS if key in before),
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


def front_matter(**fields: Any) -> list[str]:
    """The lines a card begins with: YAML that holds just these values, whatever they are."""
    text = yaml.safe_dump({"library_name": "transformers"} | fields, sort_keys=False)
    return ["---", text.rstrip(), "---", ""]
