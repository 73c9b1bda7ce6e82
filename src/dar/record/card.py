"""The model card of a trained policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dar.config.recipe import dump_recipe
from dar.config.rewards import reward_name
from dar.config.run import RunSpec
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
    lines = [
        *front_matter(base_model=spec.model.path, library=spec.model.library, tags=["rlhf", spec.algorithm.type]),
        f"# {markdown(spec.model.path)}, aligned with {spec.algorithm.type.upper()}",
        "",
        f"Trained with `dar` for {metrics[-1]['step'] if metrics else 0} steps of {spec.prompts_per_step} prompts "
        + ("with their completions" if spec.algorithm.logged else f"× {spec.num_generations} completions")
        + f" from {markdown(spec.data.train.path)}"
        + (f"; reward: {rewards}." if rewards else "."),
        "",
    ]
    found = evaluations(metrics)
    if len(found) >= 2:
        before, after = found[0], found[-1]
        lines += [
            "| held-out prompts | before | after |",
            "|---|---:|---:|",
            *(
                f"| {row.name} | {row.shown(before[row.key])} | {row.shown(after[row.key])} |"
                for row in MEASURES
                if row.key in before and row.key in after
            ),
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


def front_matter(*, library: str = "transformers", **fields: Any) -> list[str]:
    """The lines a card begins with: YAML that holds just these values, a base model only if it is one of the Hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base := fields["base_model"])) or Path(base).exists():
        del fields["base_model"]  # the Hub takes no card that names another
    text = yaml.safe_dump({"library_name": library} | fields, sort_keys=False)
    return ["---", text.rstrip(), "---", ""]
