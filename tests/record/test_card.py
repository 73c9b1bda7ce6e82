"""The model card: what was raised against a run stands beside what it reached."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from dar.config.recipe import build_spec
from dar.config.reward_model import RewardModelSpec
from dar.record.card import model_card
from dar.reward_model.card import reward_model_card

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


NAME = "a/b\nlicense: mit\n---\n# <b>x</b> \u202e"


def test_what_the_front_matter_says_is_what_was_trained_from():
    card = model_card(build_spec(RECIPE | {"model": NAME}, where="recipe.yaml"), [], [])
    beginning, rest = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    # The Hub takes no card whose base model is none of its own.
    assert yaml.safe_load(beginning) == {"library_name": "transformers", "tags": ["rlhf", "dar"]}
    hub = model_card(build_spec(RECIPE | {"model": "some/model"}, where="recipe.yaml"), [], [])
    assert yaml.safe_load(hub.split("---\n")[1])["base_model"] == "some/model"
    assert rest.startswith("\n# a/b license: mit --- \\# \\<b\\>x\\</b\\> \\[RLO\\], aligned with DAR\n")
    assert "\u202e" not in card


def test_names_make_no_markdown_of_their_own():
    hostile = "```\n# Heading\n| a | b |\n<script>"
    rewards = [{"type": "length", "target": 3, "name": hostile}]
    recipe = RECIPE | {"rewards": rewards, "data": {"train": hostile}, "output_dir": hostile}
    alerts = [ALERT | {"message": hostile}]
    card = model_card(build_spec(recipe, where="recipe.yaml"), [], alerts, command=f"dar train '{hostile}'")
    escaped = r"\`\`\` \# Heading \| a \| b \| \<script\>"
    assert f" from {escaped}; reward: {escaped} (weight 1).\n" in card
    assert f"* step 4, kl (mark): {escaped}\n" in card
    # What is left as it was stands between fences that are longer than its own.
    outside = re.sub(r"^````(sh|yaml)\n.*?\n````$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert "```" not in outside
    assert "<script>" not in outside
    assert outside.count("\n#") == 1


def test_the_card_of_a_reward_model_is_as_careful():
    recipe = {"model": NAME, "data": "`x`|y", "steps": 1, "output_dir": "run"}
    card = reward_model_card(build_spec(recipe, where="r", kind=RewardModelSpec), {}, num_pairs=3, command="dar `````")
    beginning, rest = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    assert yaml.safe_load(beginning)["tags"] == ["reward-model"]
    assert rest.startswith("\n# A reward model from a/b license: mit --- \\# ")
    assert r"preference pairs from \`x\`\|y. One output" in rest
    assert "\n``````sh\ndar `````\n``````\n" in rest
