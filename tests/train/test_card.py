"""The model card: what was raised against a run stands beside what it reached."""

from __future__ import annotations

from typing import Any

import pytest

from dar.recipe import build_spec
from dar.train.card import model_card

RECIPE: dict[str, Any] = {
    "model": "some/model",
    "data": {"train": "prompts.jsonl", "heldout": "prompts.jsonl"},
    "rewards": ["sentiment"],
    "steps": 6,
    "output_dir": "run",
}
ALERT = {"step": 4, "rule": "kl", "value": 26.0, "threshold": 25.0, "message": "KL is 26", "action": "mark"}


@pytest.mark.parametrize(
    ("rules", "alerts", "said"),
    [
        (["kl"], [ALERT, ALERT | {"step": 6}], "* step 4, kl (mark): KL is 26\n* step 6, kl (mark): KL is 26\n"),
        (["missing_eos", "kl"], [], "No alert was raised during training; watched were: missing_eos, kl.\n"),
    ],
)
def test_the_card_lists_the_alerts_or_what_raised_none(rules: list[str], alerts: list[dict[str, Any]], said: str):
    spec = build_spec(RECIPE | {"alerts": [{"type": rule, "max": 0.5} for rule in rules]}, where="recipe.yaml")
    assert f"\n\n{said}\n```yaml\n" in model_card(spec, [], alerts)


def test_a_run_that_nothing_watched_says_nothing_of_alerts():
    assert "alert" not in model_card(build_spec(RECIPE, where="recipe.yaml"), [], []).partition("```yaml")[0].lower()
