"""The model card of a reward model."""

from __future__ import annotations

from typing import Any

from dar.config.recipe import dump_recipe
from dar.config.reward_model import RewardModelSpec
from dar.record.card import front_matter
from dar.shown import fenced, markdown

ROWS = (
    ("accuracy", "accuracy", "{:.3f}"),
    ("its standard error", "accuracy_se", "{:.3f}"),
    ("longer wins (tokens)", "longer_wins_accuracy", "{:.3f}"),
    ("shorter wins", "shorter_wins_accuracy", "{:.3f}"),
    ("−log σ(margin), nats", "loss", "{:.3f}"),
    ("expected calibration error", "ece", "{:.3f}"),
)
"""(label, key of the report, form) of the figures people are shown."""


def reward_model_card(spec: RewardModelSpec, evaluation: dict[str, Any], *, num_pairs: int, command: str) -> str:
    """README.md of the model folder: what it was trained from and on, and what the held-out pairs say.

    Args:
        spec: the recipe.
        evaluation: what evaluation.json holds.
        num_pairs: that were trained on.
        command: what was run.
    """
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    rows = [row for row in ROWS if row[1] in before and row[1] in after]
    results = [(key, label, before[key], after[key]) for label, key, _ in rows]
    lines = [
        *front_matter(spec, task="text-classification", tags=["reward-model"], results=results),
        f"# A reward model from {markdown(spec.model.path)}",
        "",
        f"Trained with `dar reward-model` on {num_pairs} preference pairs from {markdown(spec.data.train.path)}. One "
        "output: the higher, the better the last message of the conversation; only differences between completions of "
        "the same prompt mean something.",
        "",
    ]
    if rows:
        lines += [
            f"| {after['num_pairs']} held-out pairs | before | after |",
            "|---|---:|---:|",
            *(f"| {label} | {form.format(before[key])} | {form.format(after[key])} |" for label, key, form in rows),
            "",
        ]
    lines += [fenced(command, "sh"), "", fenced(dump_recipe(spec), "yaml"), ""]
    return "\n".join(lines)
